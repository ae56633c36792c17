{{/* What objects are called and how they are found. */}}

{{- define "outlast.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The release's objects. "helm install outlast" gives plain "outlast-operator". Names of Services are the strictest:
     63 characters with "-operator-metrics", no dots, a letter first. */}}
{{- define "outlast.fullname" -}}
{{- $whole := printf "%s-%s" .Release.Name (include "outlast.name" .) }}
{{- if contains (include "outlast.name" .) .Release.Name }}{{ $whole = .Release.Name }}{{ end }}
{{- $name := default $whole .Values.fullnameOverride | replace "." "-" }}
{{- if regexMatch "^[0-9]" $name }}{{ $name = printf "outlast-%s" $name }}{{ end }}
{{- $name | trunc 46 | trimSuffix "-" }}
{{- end }}

{{- define "outlast.operator" -}}
{{ include "outlast.fullname" . }}-operator
{{- end }}

{{- define "outlast.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "outlast.operator" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name: name an existing ServiceAccount, or set serviceAccount.create" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* By these the operator's Pods are selected: never change them, a Deployment's selector is immutable. */}}
{{- define "outlast.selector" -}}
app.kubernetes.io/name: {{ include "outlast.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: operator
{{- end }}

{{/* The same as one word, for the flag that jobs' NetworkPolicies are made from. */}}
{{- define "outlast.selectorText" -}}
app.kubernetes.io/name={{ include "outlast.name" . }},app.kubernetes.io/instance={{ .Release.Name }},app.kubernetes.io/component=operator
{{- end }}

{{- define "outlast.labels" -}}
{{ include "outlast.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "outlast.tag" -}}
{{ default .Chart.AppVersion .Values.image.tag }}
{{- end }}

{{- define "outlast.image" -}}
{{ .Values.image.repository }}{{ with .Values.image.digest }}@{{ . }}{{ else }}:{{ include "outlast.tag" . }}{{ end }}
{{- end }}

{{- define "outlast.trainingImage" -}}
{{ default (printf "outlast-training:%s" (include "outlast.tag" .)) .Values.trainingImage }}
{{- end }}
