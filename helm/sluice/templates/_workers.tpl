{{- /* The worker group of a pool: a dict of root, name and pool. */ -}}
{{- define "sluice.workerGroup" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $path := printf "pools.%s" .name -}}
{{- $config := default dict .pool.config -}}
{{- $pod := mergeOverwrite (deepCopy $values.pod) (default dict .pool.pod) -}}
{{- $numPods := int (dig "pods" 1 .pool) -}}
{{- $maxPods := $numPods -}}
{{- $workers := int (dig "workers" 1 $config) -}}
{{- $most := $workers -}}
{{- if $values.autoscaling.enabled -}}
{{- $maxPods = int (default $numPods .pool.maxPods) -}}
{{- if lt $maxPods $numPods }}{{ fail (printf "%s.maxPods: %d is under %s.pods = %d; raise it" $path $maxPods $path $numPods) }}{{ end -}}
{{- $most = int (default $workers (dig "max_workers" nil $config)) -}}
{{- end -}}
{{- $perPod := max (ceil (divf $workers $numPods)) (ceil (divf $most $maxPods)) | int -}}
{{- $guests := include "sluice.guests" $root | fromYaml -}}
{{- $cores := addf 1 (mulf $perPod (dig "cpus" 1 $config)) $guests.cpus | ceil | int -}}
{{- $gpus := addf (mulf $perPod (dig "gpus" 0 $config)) $guests.gpus | ceil | int -}}
{{- if gt $gpus (int $pod.gpu.count) -}}
{{- fail (printf "%s.pod.gpu.count: %d, but the workers of one pod need %d GPUs; raise it, or %s.pods" $path (int $pod.gpu.count) $gpus $path) -}}
{{- end -}}
groupName: {{ .name | replace "_" "-" }}
replicas: {{ $numPods }}
minReplicas: {{ $numPods }}
maxReplicas: {{ max 1 $maxPods }}
rayStartParams:
  num-cpus: {{ $cores | quote }}
  num-gpus: {{ $pod.gpu.count | toString | quote }}
  {{- include "sluice.rayPorts" $root | nindent 2 }}
template:
  metadata:
    labels:
      {{- include "sluice.podLabels" $root | nindent 6 }}
      sluice/part: worker
      sluice/pool: {{ .name }}
    annotations:
      {{- include "sluice.podAnnotations" $root | trim | nindent 6 }}
      {{- with $pod.networks }}
      k8s.v1.cni.cncf.io/networks: {{ . | quote }}
      {{- end }}
      {{- with $pod.annotations }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
  spec:
    automountServiceAccountToken: false
    terminationGracePeriodSeconds: {{ include "sluice.graceSeconds" $root }}
    {{- if $pod.hostNetwork }}
    hostNetwork: true
    dnsPolicy: ClusterFirstWithHostNet
    {{- end }}
    {{- include "sluice.workerPlace" (dict "root" $root "pod" $pod) | trim | nindent 4 }}
    {{- include "sluice.modelInit" $root | nindent 4 }}
    containers:
      - name: ray-worker
        image: {{ include "sluice.image" $root | quote }}
        imagePullPolicy: {{ $values.image.pullPolicy }}
        env:
          {{- include "sluice.env" $root | nindent 10 }}
          {{- with $pod.env }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        ports:
          - name: serve
            containerPort: {{ $values.config.http.port }}
          - name: metrics
            containerPort: 8080
        resources:
          requests: &{{ .name }}
            cpu: {{ $pod.cpu | quote }}
            memory: {{ $pod.memory | quote }}
            {{- range list $pod.gpu $pod.rdma }}
            {{- if .count }}
            {{ .resource }}: {{ .count }}
            {{- end }}
            {{- end }}
          limits: *{{ .name }}
        securityContext:
          allowPrivilegeEscalation: false
          capabilities:
            drop: [ALL]
            {{- if $pod.rdma.count }}
            add: [IPC_LOCK]
            {{- end }}
        lifecycle:
          preStop:
            exec:
              command:
                - python3
                - /etc/sluice-pod/pod_health.py
                - drain
                - --ports
                - {{ printf "%d-%d" (int $values.config.words.port_min) (int $values.config.words.port_max) }}
                - --deadline-s
                - {{ include "sluice.drainSeconds" $root | quote }}
        {{- include "sluice.probes" (dict "root" $root "head" false) | nindent 8 }}
        volumeMounts:
          {{- include "sluice.mounts" $root | nindent 10 }}
          - name: model
            mountPath: {{ $values.model.path }}
            readOnly: true
            {{- if and $values.model.pvc.subPath (not $values.model.init.enabled) }}
            subPath: {{ $values.model.pvc.subPath | quote }}
            {{- end }}
    volumes:
      - name: shared-mem
        emptyDir:
          medium: Memory
          sizeLimit: {{ $pod.sharedMemory | quote }}
      {{- include "sluice.volumes" $root | nindent 6 }}
      - name: model
        {{- if $values.model.init.enabled }}
        emptyDir:
          sizeLimit: {{ $values.model.init.sizeLimit | quote }}
        {{- else if $values.model.pvc.existingClaim }}
        persistentVolumeClaim:
          claimName: {{ $values.model.pvc.existingClaim }}
          readOnly: true
        {{- else }}
        {{- fail "model.pvc.existingClaim: empty; name a claim with the checkpoint, or enable model.init" }}
        {{- end }}
{{- end -}}

{{- /* Cores and GPUs that one pod offers to workers of pools without pods of their own. */ -}}
{{- define "sluice.guests" -}}
{{- $cpus := 0 -}}
{{- $gpus := 0 -}}
{{- $numPods := include "sluice.numPods" . | int -}}
{{- range $pool := .Values.pools -}}
{{- if not (dig "pods" 1 $pool) -}}
{{- $share := ceil (divf (dig "config" "workers" 1 $pool) $numPods) -}}
{{- $cpus = addf $cpus (mulf $share (dig "config" "cpus" 1 $pool)) -}}
{{- $gpus = addf $gpus (mulf $share (dig "config" "gpus" 0 $pool)) -}}
{{- end -}}
{{- end -}}
cpus: {{ $cpus }}
gpus: {{ $gpus }}
{{- end -}}

{{- /* Where the pod may run: a dict of root and pod. */ -}}
{{- define "sluice.workerPlace" -}}
{{- $root := .root -}}
{{- $pod := .pod -}}
securityContext:
  {{- include "sluice.podSecurity" $root | nindent 2 }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $pod.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- include "sluice.tolerations" $pod.tolerations }}
{{- if or $pod.nodeAffinity $pod.oncePer }}
affinity:
  {{- with $pod.nodeAffinity }}
  nodeAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      nodeSelectorTerms:
        - matchExpressions:
            {{- toYaml . | nindent 12 }}
  {{- end }}
  {{- with $pod.oncePer }}
  podAntiAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: {{ . | quote }}
        labelSelector:
          matchLabels:
            {{- include "sluice.selector" $root | nindent 12 }}
            sluice/part: worker
  {{- end }}
{{- end }}
{{- with $pod.spread }}
topologySpreadConstraints:
  {{- range . }}
  - topologyKey: {{ .topologyKey | quote }}
    maxSkew: {{ .maxSkew }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "sluice.selector" $root | nindent 8 }}
        sluice/part: worker
  {{- end }}
{{- end }}
{{- end -}}

{{- define "sluice.modelInit" -}}
{{- with .Values.model.init }}
{{- if .enabled }}
{{- if not .command }}{{ fail "model.init.command: empty; say what fills $MODEL_PATH" }}{{ end }}
initContainers:
  - name: model
    image: {{ default (include "sluice.image" $) .image | quote }}
    imagePullPolicy: {{ $.Values.image.pullPolicy }}
    command:
      {{- toYaml .command | nindent 6 }}
    env:
      - name: MODEL_PATH
        value: {{ $.Values.model.path }}
      {{- with .env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    securityContext:
      allowPrivilegeEscalation: false
      capabilities:
        drop: [ALL]
    volumeMounts:
      - name: model
        mountPath: {{ $.Values.model.path }}
{{- end }}
{{- end }}
{{- end -}}
