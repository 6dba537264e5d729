{{/* Names, labels, and what pods of different kinds share. */}}

{{/* Short enough for what controllers append to it: hashes, ordinals, -convert-XXXXXXXX. */}}
{{- define "requant.fullname" -}}
{{- $name := .Release.Name -}}
{{- if not (contains .Chart.Name $name) -}}
{{- $name = printf "%s-%s" $name .Chart.Name -}}
{{- end -}}
{{- .Values.fullnameOverride | default $name | replace "." "-" | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* What pods are selected by, without their component; never changes in a release. */}}
{{- define "requant.releaseLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "requant.labels" -}}
{{ include "requant.releaseLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Takes a list: the root, and the number of devices, which decides between the two builds. */}}
{{- define "requant.image" -}}
{{- $root := index . 0 -}}
{{- with $root.Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default (printf "%s-%s" $root.Chart.AppVersion (gt (int (index $ 1)) 0 | ternary "cuda" "cpu")) }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "requant.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "requant.fullname" .) "default") -}}
{{- end -}}

{{- define "requant.claimName" -}}
{{- .Values.storage.existingClaim | default (printf "%s-models" (include "requant.fullname" .)) -}}
{{- end -}}

{{- define "requant.checkpointFolder" -}}
{{ .Values.storage.mountPath }}/{{ .Values.checkpoint.name }}
{{- end -}}

{{/* The key's variable, or nothing. It is never an argument: those are read by everybody on the node. */}}
{{- define "requant.apiKeyEnv" -}}
{{- if or .Values.apiKey.value .Values.apiKey.secretName -}}
- name: VLLM_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .Values.apiKey.secretName | default (printf "%s-api-key" (include "requant.fullname" .)) }}
      key: {{ .Values.apiKey.secretKey }}
{{- end -}}
{{- end -}}

{{/*
How long a pod may take to go: all that happens after it is told to, and then the end of vLLM's processes, which on busy
cores was seen to take half a minute when the last request had long been answered.
*/}}
{{- define "requant.graceSeconds" -}}
{{- add .Values.shutdown.preStopSeconds .Values.shutdown.drainSeconds 45 -}}
{{- end -}}

{{/* Takes a list: requests and limits, the name of a device, and how many of it. */}}
{{- define "requant.resources" -}}
{{- $resources := deepCopy (index . 0) -}}
{{- if gt (int (index . 2)) 0 -}}
{{- $resources = mergeOverwrite $resources (dict "limits" (dict (index . 1) (int (index . 2)))) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* The pod's part of what the restricted Pod Security Standard asks for. */}}
{{- define "requant.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.security }}
{{- if not (kindIs "invalid" .runAsUser) }}
runAsUser: {{ int .runAsUser }}
{{- end }}
{{- if not (kindIs "invalid" .runAsGroup) }}
runAsGroup: {{ int .runAsGroup }}
{{- end }}
{{- if not (kindIs "invalid" .fsGroup) }}
fsGroup: {{ int .fsGroup }}
# or every start would walk through all checkpoints
fsGroupChangePolicy: OnRootMismatch
{{- end }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Takes: is the root file system to be read-only? */}}
{{- define "requant.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: {{ . }}
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What a container needs that may write nowhere else, as a user who may not be in the image's list of users. */}}
{{- define "requant.homeEnv" -}}
- name: HOME
  value: /cache
- name: USER
  value: requant
{{- end -}}

{{/* What the schema cannot say because it is about several values at once. */}}
{{- define "requant.check" -}}
{{- with .Values -}}
{{- if and .apiKey.value .apiKey.secretName -}}
{{- fail "apiKey.value and apiKey.secretName: give one of them, not both" -}}
{{- end -}}
{{- if gt (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas (%d) is more than autoscaling.maxReplicas (%d)" (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas)) -}}
{{- end -}}
{{- $world := mul .server.tensorParallelSize .server.pipelineParallelSize | int -}}
{{- $nodes := .multiNode.enabled | ternary (int .multiNode.size) 1 -}}
{{- if mod $world $nodes -}}
{{- fail (printf "server.tensorParallelSize × server.pipelineParallelSize is %d, which multiNode.size (%d) does not divide" $world $nodes) -}}
{{- end -}}
{{- if and (gt (int .server.gpus) 0) (gt (div $world $nodes | int) (int .server.gpus)) -}}
{{- fail (printf "server.gpus is %d, but a pod runs %d ranks (server.tensorParallelSize × server.pipelineParallelSize over %d pods)" (int .server.gpus) (div $world $nodes | int) $nodes) -}}
{{- end -}}
{{- $own := "api-key|host|port|served-model-name|max-model-len|tensor-parallel-size|pipeline-parallel-size|shutdown-timeout|activation-bits|headless|nnodes|node-rank|master-addr|master-port|distributed-executor-backend" -}}
{{- range .server.extraArgs -}}
{{- if regexMatch (printf "^(--(%s)|-tp|-pp|-n|-r)(=|$)" (replace "-" "[-_]" $own)) . -}}
{{- fail (printf "server.extraArgs: %s is the chart's to set, from a value of its own" (splitList "=" . | first)) -}}
{{- end -}}
{{- end -}}
{{- range $name := list "VLLM_API_KEY" "HF_TOKEN" -}}
{{- if hasKey $.Values.server.env $name -}}
{{- fail (printf "server.env: %s is a secret; give apiKey, or extraEnv with a secretKeyRef" $name) -}}
{{- end -}}
{{- end -}}
{{- range $label, $_ := .server.podLabels -}}
{{- if hasPrefix "app.kubernetes.io/" $label -}}
{{- fail (printf "server.podLabels: %s is the chart's to set, since selectors ask for it" $label) -}}
{{- end -}}
{{- end -}}
{{- if and (eq (toString .server.rollingUpdate.maxUnavailable) "0") (eq (toString .server.rollingUpdate.maxSurge) "0") -}}
{{- fail "server.rollingUpdate: maxUnavailable and maxSurge cannot both be 0" -}}
{{- end -}}
{{- if .conversion.enabled -}}
{{- if not .conversion.model -}}
{{- fail "conversion.model: say what is to be converted" -}}
{{- end -}}
{{- range .conversion.args -}}
{{- if regexMatch "^(-o|--output|--work-dir|--resume|--dry-run)(=|$)" . -}}
{{- fail (printf "conversion.args: %s is the chart's to set" (splitList "=" . | first)) -}}
{{- else if eq . "--overwrite" -}}
{{- fail "conversion.args: --overwrite would take a checkpoint from under its servers; give checkpoint.name another value" -}}
{{- end -}}
{{- end -}}
{{- if and .conversion.hubToken.secretName (not .conversion.fromHub) -}}
{{- fail "conversion.hubToken goes with conversion.fromHub" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
