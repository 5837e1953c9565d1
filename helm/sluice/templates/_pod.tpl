{{- /* Ports on which Ray listens, each of them named so that a NetworkPolicy can name it. */ -}}
{{- define "sluice.rayPorts" -}}
node-manager-port: "6380"
object-manager-port: "6381"
runtime-env-agent-port: "6382"
dashboard-agent-grpc-port: "6383"
dashboard-agent-listen-port: "52365"
metrics-export-port: "8080"
min-worker-port: "10002"
max-worker-port: "19999"
{{- end -}}

{{- define "sluice.podLabels" -}}
{{ include "sluice.labels" . }}
{{ include "sluice.selector" . }}
{{- end -}}

{{- define "sluice.podAnnotations" -}}
{{- if eq .Values.configDelivery "file" }}
sluice/config-sha256: {{ include "sluice.config" . | sha256sum }}
{{- end }}
sluice/pod-health-sha256: {{ .Files.Get "files/pod_health.py" | sha256sum }}
{{- end -}}

{{- define "sluice.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "sluice.env" -}}
- name: RAY_SERVE_ENABLE_HA_PROXY
  value: "1"
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: HF_HUB_OFFLINE
  value: "1"
- name: UCX_TCP_PORT_RANGE
  value: 21000-21999
- name: SLUICE_CLUSTER_SECRET
  valueFrom:
    secretKeyRef:
      name: {{ include "sluice.clusterSecretName" . }}
      key: {{ .Values.clusterSecret.key }}
{{- with include "sluice.apiKeysSecretName" . }}
- name: SLUICE_API_KEYS
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.apiKeys.key }}
{{- end }}
{{- end -}}

{{- /* A dict of root and head (bool). */ -}}
{{- define "sluice.probes" -}}
{{- $values := .root.Values -}}
{{- $script := list "python3" "/etc/sluice-pod/pod_health.py" -}}
{{- $ports := printf "%d-%d" (int $values.config.words.port_min) (int $values.config.words.port_max) -}}
{{- $live := list "live" "--stalled-s" (toString $values.probes.live.stalledSeconds) "--ports" $ports -}}
{{- $ready := list "ready" "--public-port" (toString (int $values.config.http.port)) -}}
{{- if .head }}{{ $live = list "live" "--head" }}{{ $ready = $live }}{{ end -}}
startupProbe:
  exec:
    command: {{ concat $script (list "live") | toJson }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ $values.probes.start.failureThreshold }}
livenessProbe:
  exec:
    command: {{ concat $script $live | toJson }}
  periodSeconds: {{ $values.probes.live.periodSeconds }}
  timeoutSeconds: 10
  failureThreshold: {{ $values.probes.live.failureThreshold }}
readinessProbe:
  exec:
    command: {{ concat $script $ready | toJson }}
  periodSeconds: {{ $values.probes.ready.periodSeconds }}
  timeoutSeconds: 5
  failureThreshold: {{ $values.probes.ready.failureThreshold }}
{{- end -}}

{{- define "sluice.mounts" -}}
- name: shared-mem
  mountPath: /dev/shm
- name: ray-logs
  mountPath: /tmp/ray
- name: pod-health
  mountPath: /etc/sluice-pod
  readOnly: true
{{- if eq .Values.configDelivery "file" }}
- name: config
  mountPath: /etc/sluice
  readOnly: true
{{- end }}
{{- if .Values.wordsTls.existingSecret }}
- name: words-tls
  mountPath: /etc/sluice-tls
  readOnly: true
{{- end }}
{{- end -}}

{{- define "sluice.volumes" -}}
- name: ray-logs
  emptyDir: {}
- name: pod-health
  configMap:
    name: {{ include "sluice.name" . }}-pod-health
{{- if eq .Values.configDelivery "file" }}
- name: config
  configMap:
    name: {{ include "sluice.name" . }}-config
{{- end }}
{{- with .Values.wordsTls.existingSecret }}
- name: words-tls
  secret:
    secretName: {{ . }}
{{- end }}
{{- end -}}
