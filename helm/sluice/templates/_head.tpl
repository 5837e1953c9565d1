{{- define "sluice.head" -}}
rayStartParams:
  num-cpus: "0"
  num-gpus: "0"
  port: "6379"
  dashboard-host: 0.0.0.0
  dashboard-port: "8265"
  ray-client-server-port: "10001"
  {{- include "sluice.rayPorts" . | nindent 2 }}
template:
  metadata:
    labels:
      {{- include "sluice.podLabels" . | nindent 6 }}
      sluice/part: head
    annotations:
      {{- include "sluice.podAnnotations" . | trim | nindent 6 }}
  spec:
    automountServiceAccountToken: {{ .Values.autoscaling.enabled }}
    securityContext:
      {{- include "sluice.podSecurity" . | nindent 6 }}
    {{- with .Values.image.pullSecrets }}
    imagePullSecrets:
      {{- range . }}
      - name: {{ . }}
      {{- end }}
    {{- end }}
    {{- with .Values.head.priorityClassName }}
    priorityClassName: {{ . }}
    {{- end }}
    {{- with .Values.head.nodeSelector }}
    nodeSelector:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- include "sluice.tolerations" .Values.head.tolerations | nindent 4 }}
    containers:
      - name: ray-head
        image: {{ include "sluice.image" . | quote }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        env:
          {{- include "sluice.env" . | nindent 10 }}
        ports:
          - name: gcs-server
            containerPort: 6379
          - name: dashboard
            containerPort: 8265
          - name: client
            containerPort: 10001
          - name: serve
            containerPort: {{ .Values.config.http.port }}
          - name: metrics
            containerPort: 8080
        resources:
          requests: &head
            cpu: {{ .Values.head.cpu | quote }}
            memory: {{ .Values.head.memory | quote }}
          limits: *head
        securityContext:
          allowPrivilegeEscalation: false
          capabilities:
            drop: [ALL]
        {{- include "sluice.probes" (dict "root" . "head" true) | nindent 8 }}
        volumeMounts:
          {{- include "sluice.mounts" . | nindent 10 }}
    volumes:
      - name: shared-mem
        emptyDir:
          medium: Memory
      {{- include "sluice.volumes" . | nindent 6 }}
{{- end -}}

{{- define "sluice.tolerations" -}}
{{- with . }}
tolerations:
  {{- range . }}
  - operator: {{ default "Exists" .operator }}
    {{- with .key }}
    key: {{ . | quote }}
    {{- end }}
    {{- with .value }}
    value: {{ . | quote }}
    {{- end }}
    {{- with .effect }}
    effect: {{ . }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end -}}
