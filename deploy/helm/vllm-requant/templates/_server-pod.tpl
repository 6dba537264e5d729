{{/*
A pod of a server. Takes a list: the root, and the pod's role:
  server   all of a server, on one node
  leader   the first pod of a group: as `server`, but others compute too
  worker   the others
*/}}
{{- define "requant.serverPod" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $worker := eq $role "worker" -}}
{{- $component := $worker | ternary "worker" "server" -}}
{{- with $root.Values -}}
metadata:
  labels:
    # no version of the chart: another one alone must not cost minutes of loading
    {{- include "requant.releaseLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $component }}
    {{- with .server.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # another key is another pod: variables are read when a process starts
    checksum/api-key: {{ .apiKey | toJson | sha256sum }}
    {{- with .server.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "requant.serviceAccountName" $root }}
  automountServiceAccountToken: false
  # a Service called vllm would set VLLM_PORT to an address, which vLLM takes for a setting of its own
  enableServiceLinks: false
  {{- with .image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "requant.podSecurityContext" $root | nindent 4 }}
  {{- if $worker }}
  # workers are needed until their leader's last request is answered
  terminationGracePeriodSeconds: {{ add (include "requant.graceSeconds" $root) 15 }}
  {{- else }}
  terminationGracePeriodSeconds: {{ include "requant.graceSeconds" $root }}
  {{- end }}
  {{- with .server.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .server.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .server.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .server.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .server.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .server.topologySpread }}
  topologySpreadConstraints:
    {{- range . }}
    - topologyKey: {{ .topologyKey }}
      maxSkew: {{ int .maxSkew }}
      whenUnsatisfiable: {{ .whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "requant.releaseLabels" $root | nindent 10 }}
          app.kubernetes.io/component: {{ $component }}
    {{- end }}
  {{- end }}
  {{- if .conversion.enabled }}
  initContainers:
    # the folder appears under its name when it is complete
    - name: wait-for-checkpoint
      image: {{ include "requant.image" (list $root .server.gpus) }}
      imagePullPolicy: {{ .image.pullPolicy }}
      command: [/bin/sh, -c, 'until [ -f "$0/config.json" ]; do sleep 5; done']
      args: [{{ include "requant.checkpointFolder" $root | quote }}]
      securityContext:
        {{- include "requant.containerSecurityContext" true | nindent 8 }}
      resources:
        requests: {cpu: 10m, memory: 16Mi}
        limits: {memory: 64Mi}
      volumeMounts:
        - {name: models, mountPath: {{ .storage.mountPath }}, readOnly: true}
  {{- end }}
  containers:
    - name: {{ $component }}
      image: {{ include "requant.image" (list $root .server.gpus) }}
      imagePullPolicy: {{ .image.pullPolicy }}
      {{- include "requant.serverCommand" (list $root $role) | nindent 6 }}
      env:
        {{- include "requant.homeEnv" $root | nindent 8 }}
        {{- if not $worker }}
        {{- with include "requant.apiKeyEnv" $root }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- end }}
        {{- if ne $role "server" }}
        # with several interfaces vLLM might announce the wrong one to its peers
        - name: VLLM_HOST_IP
          valueFrom:
            fieldRef:
              fieldPath: status.podIP
        {{- end }}
        {{- range $name, $value := .server.env }}
        - name: {{ $name }}
          value: {{ $value | quote }}
        {{- end }}
        {{- with .server.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if not $worker }}
      ports:
        - name: http
          containerPort: {{ int .server.port }}
      {{- range $probe, $settings := .probes }}
      {{ $probe }}Probe:
        httpGet:
          path: /health
          port: http
        {{- toYaml $settings | nindent 8 }}
      {{- end }}
      {{- end }}
      lifecycle:
        preStop:
          sleep:
            {{- $drain := $worker | ternary (int .shutdown.drainSeconds) 0 }}
            seconds: {{ add .shutdown.preStopSeconds $drain }}
      # the reason for which a checkpoint was refused is the last line of the log
      terminationMessagePolicy: FallbackToLogsOnError
      securityContext:
        {{- include "requant.containerSecurityContext" .server.readOnlyRootFilesystem | nindent 8 }}
      resources:
        {{- include "requant.resources" (list .server.resources .server.gpuResource .server.gpus) | nindent 8 }}
      volumeMounts:
        - {name: models, mountPath: {{ .storage.mountPath }}, readOnly: true}
        - {name: cache, mountPath: /cache}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    - name: models
      persistentVolumeClaim:
        claimName: {{ include "requant.claimName" $root }}
        readOnly: true
    - name: cache
      emptyDir:
        sizeLimit: {{ .server.cacheSize }}
    - name: tmp
      emptyDir:
        sizeLimit: 1Gi
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .server.sharedMemory }}
{{- end -}}
{{- end -}}

{{/* `command` and `args` of a server's container; takes what "requant.serverPod" does. */}}
{{- define "requant.serverCommand" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- with $root.Values.multiNode -}}
{{- if eq $role "server" -}}
command: [requant, serve]
args:
  {{- include "requant.frontendArgs" $root | nindent 2 }}
  {{- include "requant.engineArgs" $root | nindent 2 }}
{{- else if eq .executor "native" -}}
command: [requant, serve]
args:
{{- if eq $role "leader" }}
  {{- include "requant.frontendArgs" $root | nindent 2 }}
{{- else }}
  - {{ include "requant.checkpointFolder" $root }}
  - --headless
{{- end }}
  {{- include "requant.engineArgs" $root | nindent 2 }}
  - --nnodes={{ int .size }}
  # the controller sets these two in every pod
  - --node-rank=$(LWS_WORKER_INDEX)
  - --master-addr=$(LWS_LEADER_ADDRESS)
  - --master-port={{ int .masterPort }}
{{- else if eq $role "leader" -}}
command:
  - /bin/sh
  - -ec
  # vLLM itself waits until the cluster has all the devices that it needs
  - |
    ray start --head --port={{ int .rayPort }} --node-ip-address="$VLLM_HOST_IP" --include-dashboard=false --disable-usage-stats
    exec requant serve "$@"
  - leader
args:
  {{- include "requant.frontendArgs" $root | nindent 2 }}
  {{- include "requant.engineArgs" $root | nindent 2 }}
  - --distributed-executor-backend=ray
{{- else -}}
command:
  - /bin/sh
  - -ec
  # a worker that gives up before the head is there would have its whole group created anew
  - |
    until python3 -c 'import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)' "$1" "$2" 2>/dev/null
    do sleep 2; done
    exec ray start --address="$1:$2" --node-ip-address="$VLLM_HOST_IP" --disable-usage-stats --block
  - worker
args:
  - $(LWS_LEADER_ADDRESS)
  - {{ .rayPort | int | quote }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Arguments of what answers HTTP, the checkpoint first. */}}
{{- define "requant.frontendArgs" -}}
{{- with .Values -}}
- {{ include "requant.checkpointFolder" $ }}
- --host={{ .server.host }}
- --port={{ int .server.port }}
- --shutdown-timeout={{ int .shutdown.drainSeconds }}
# probes and scrapes come every few seconds
- --disable-access-log-for-endpoints=/health,/metrics,/ping
- --disable-fastapi-docs
{{- end -}}
{{- end -}}

{{/* Arguments that all processes of a server have to agree on. */}}
{{- define "requant.engineArgs" -}}
{{- with .Values -}}
- --served-model-name={{ .server.servedModelName | default .checkpoint.name }}
- --tensor-parallel-size={{ int .server.tensorParallelSize }}
{{- if gt (int .server.pipelineParallelSize) 1 }}
- --pipeline-parallel-size={{ int .server.pipelineParallelSize }}
{{- end }}
{{- if eq (int .server.activationBits) 8 }}
- --additional-config.requant.activation_bits=8
{{- end }}
{{- if .server.maxModelLen }}
- --max-model-len={{ int .server.maxModelLen }}
{{- end }}
{{- range .server.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}
{{- end -}}
