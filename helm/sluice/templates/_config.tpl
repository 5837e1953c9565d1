{{- /* The sluice config: what the values say, and what follows from the pods. */ -}}
{{- define "sluice.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $_ := set $config "model" (merge (dict "path" .Values.model.path) (default dict $config.model)) -}}
{{- $_ := set $config "words" (merge (dict "host" "0.0.0.0" "secret_env" "SLUICE_CLUSTER_SECRET") $config.words) -}}
{{- with .Values.wordsTls }}
{{- if .existingSecret }}
{{- $tls := dict "cert_file" "/etc/sluice-tls/tls.crt" "key_file" "/etc/sluice-tls/tls.key" "ca_file" "/etc/sluice-tls/ca.crt" -}}
{{- if .serverName }}{{ $_ := set $tls "server_name" .serverName }}{{ end -}}
{{- $_ := set $config.words "tls" $tls -}}
{{- end }}
{{- end }}
{{- $http := merge (dict "host" "0.0.0.0") $config.http -}}
{{- if not (hasKey $http "replicas") }}{{ $_ := set $http "replicas" (include "sluice.numPods" . | int) }}{{ end -}}
{{- if include "sluice.apiKeysSecretName" . }}{{ $_ := set $http "api_keys_env" "SLUICE_API_KEYS" }}{{ end -}}
{{- $_ := set $config "http" $http -}}
{{- $pools := dict -}}
{{- range $name, $pool := .Values.pools }}{{ $_ := set $pools $name (default dict $pool.config) }}{{ end -}}
{{- $_ := set $config "pools" $pools -}}
{{- toYaml $config -}}
{{- end -}}

{{- define "sluice.numPods" -}}
{{- $count := 0 -}}
{{- range .Values.pools }}{{ $count = add $count (int (dig "pods" 1 .)) }}{{ end -}}
{{- if not $count }}{{ fail "pools: none has pods; give one pods: 1" }}{{ end -}}
{{- $count -}}
{{- end -}}

{{- /* How long a pod may need to become idle. */ -}}
{{- define "sluice.drainSeconds" -}}
{{- $http := .Values.config.http -}}
{{- maxf $http.request_timeout_s $http.drain_s .Values.config.controller.drain_timeout_s | ceil | int -}}
{{- end -}}

{{- define "sluice.graceSeconds" -}}
{{- add (include "sluice.drainSeconds" . | int) .Values.drain.marginSeconds -}}
{{- end -}}

{{- /* What Serve deploys. */ -}}
{{- define "sluice.serveConfig" -}}
{{- $args := dict -}}
{{- if eq .Values.configDelivery "file" -}}
{{- $_ := set $args "config" "/etc/sluice/sluice.yaml" -}}
{{- else -}}
{{- $_ := set $args "config_inline" (include "sluice.config" . | fromYaml) -}}
{{- end -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ .Values.config.http.port }}
applications:
  - name: sluice
    route_prefix: /
    import_path: deploy.app:build
    args:
{{ toYaml $args | indent 6 }}
{{- end -}}
