#!/usr/bin/env bash
# The second machine: a decode worker. ADDRESS is its own address, FIRST the first machine's; Ctrl-C ends it.
set -euo pipefail
: "${ADDRESS:?give this machine\'s address, such as ADDRESS=10.0.0.2}" "${FIRST:?give the first machine\'s address}"
export KVRELAY_REDIS_URL="redis://$FIRST:6379/0" KVRELAY_INSECURE=true
exec kvrelay serve decode --host "$ADDRESS" --port 50052 --model "${MODEL:-smollm2-135m-instruct}"
