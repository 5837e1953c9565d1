{{- define "sluice.name" -}}
{{- $name := default .Release.Name .Values.nameOverride | lower -}}
{{- if gt (len $name) 40 }}{{ fail (printf "nameOverride: %q is longer than 40 characters; name a shorter one" $name) }}{{ end -}}
{{- $name -}}
{{- end -}}

{{- define "sluice.labels" -}}
app.kubernetes.io/part-of: sluice
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* What selects the pods of the release. KubeRay keeps labels of its own beside these. */ -}}
{{- define "sluice.selector" -}}
sluice/release: {{ include "sluice.name" . }}
{{- end -}}

{{- define "sluice.image" -}}
{{ printf "%s:%s" .Values.image.repository .Values.image.tag }}
{{- end -}}

{{- define "sluice.clusterSecretName" -}}
{{ default (printf "%s-cluster-secret" (include "sluice.name" .)) .Values.clusterSecret.existingSecret }}
{{- end -}}

{{- define "sluice.apiKeysSecretName" -}}
{{- if .Values.apiKeys.existingSecret -}}
{{ .Values.apiKeys.existingSecret }}
{{- else if .Values.apiKeys.lines -}}
{{ include "sluice.name" . }}-api-keys
{{- end -}}
{{- end -}}

{{- define "sluice.tlsSecretName" -}}
{{ default (printf "%s-tls" (include "sluice.name" .)) .Values.ingress.tls.existingSecret }}
{{- end -}}

{{- /* KubeRay's name for the Service of the public port. */ -}}
{{- define "sluice.serveService" -}}
{{ include "sluice.name" . }}-serve-svc
{{- end -}}
