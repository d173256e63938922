{{/* Spec of a Job. Takes root, it, name and hosts. */}}
{{- define "kvrelay.credentialsJob" -}}
backoffLimit: 3
activeDeadlineSeconds: 300
ttlSecondsAfterFinished: 3600
template:
  metadata: {{ include "kvrelay.podMetadata" .it | nindent 4 }}
  spec: {{ include "kvrelay.pod" .it | nindent 4 }}
    serviceAccountName: {{ .name }}
    restartPolicy: Never
    containers:
      - name: credentials
        image: {{ include "kvrelay.image" (dict "root" .root "image" .root.Values.image.gateway) }}
        imagePullPolicy: {{ .root.Values.image.pullPolicy }}
        command: [python, /scripts/publish_credentials.py]
        args: {{ concat (list "--prefix" (include "kvrelay.name" .root) "--namespace" .root.Release.Namespace "--trust-domain" .root.Values.credentials.trustDomain) .hosts | toJson }}
        resources:
          requests: {cpu: 100m, memory: 128Mi}
          limits: {memory: 256Mi}
        securityContext: {{ include "kvrelay.hardened" .root | nindent 10 }}
        volumeMounts:
          - {name: scripts, mountPath: /scripts, readOnly: true}
          - {name: work, mountPath: /tmp}
          - {name: token, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
    volumes:
      - name: scripts
        configMap: {name: {{ .name }}}
      - name: work
        emptyDir: {medium: Memory, sizeLimit: 16Mi}
      - name: token
        projected:
          defaultMode: 0440
          sources:
            - serviceAccountToken: {path: token, expirationSeconds: 600}
            - configMap:
                name: kube-root-ca.crt
                items: [{key: ca.crt, path: ca.crt}]
{{- end }}
