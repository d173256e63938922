{{/*
Takes name, root, component, settings and model. Prefill workers follow the prompt tokens that wait for them, decode
workers the part of the KV blocks that is in use: both say that requests wait before clients notice.
*/}}
{{- define "kvrelay.autoscaler" -}}
{{- $scaling := .settings.autoscaling -}}
{{- $pods := printf "namespace=%q,pod=~%q" .root.Release.Namespace (printf "%s-.+" .name) -}}
{{- if .root.Values.metrics.prometheusAddress -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ .name }}
  labels: {{ include "kvrelay.labels" . | nindent 4 }}
spec:
  scaleTargetRef: {name: {{ .name }}}
  minReplicaCount: {{ $scaling.min }}
  maxReplicaCount: {{ $scaling.max }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior: {scaleDown: {stabilizationWindowSeconds: 300}}
  triggers:
    - type: prometheus
      {{- if eq .component "prefill" }}
      metricType: AverageValue
      {{- else }}
      metricType: Value
      {{- end }}
      metadata:
        serverAddress: {{ .root.Values.metrics.prometheusAddress | quote }}
        threshold: {{ $scaling.target | toString | quote }}
        {{- if eq .component "prefill" }}
        query: {{ printf "sum(kvrelay_worker_queued_prompt_tokens{%s})" $pods | quote }}
        {{- else }}
        query: {{ printf "sum(kvrelay_worker_kv_blocks{%s,state=\"used\"}) / sum(kvrelay_worker_kv_blocks{%s})" $pods $pods | quote }}
        {{- end }}
{{- else -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ .name }}
  labels: {{ include "kvrelay.labels" . | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ .name }}}
  minReplicas: {{ $scaling.min }}
  maxReplicas: {{ $scaling.max }}
  behavior: {scaleDown: {stabilizationWindowSeconds: 300}}
  metrics:
    - type: Pods
      pods:
        metric: {name: {{ eq .component "prefill" | ternary "kvrelay_worker_queued_prompt_tokens" "kvrelay_worker_kv_used_ratio" }}}
        target: {type: AverageValue, averageValue: {{ eq .component "prefill" | ternary ($scaling.target | toString) (printf "%dm" (mulf $scaling.target 1000 | int)) | quote }}}
{{- end }}
{{- end }}
