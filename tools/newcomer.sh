#!/usr/bin/env bash
# What README and docs say, as a newcomer does it: in new environments, an empty home folder, and a folder that has packages of the
# names that kvrelay's own have. Prints a line for each check; ends at the first that fails, with the end of its output.
#
#   PYTHON=python3            makes the environments
#   TORCH_INDEX_URL=          where torch comes from, as for make
#   KVRELAY_MODEL_DIR=        a model store that may have the demo model already
#   NEWCOMER_PORT=50050       the gateway's port; HTTP's is 30 above
#   NEWCOMER_OPENAI_PORT=8000
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
port=${NEWCOMER_PORT:-50050}
openai_port=${NEWCOMER_OPENAI_PORT:-8000}
gateway=127.0.0.1:$port
python=${PYTHON:-python3}
work=$(mktemp -d "${TMPDIR:-/tmp}/kvrelay-newcomer.XXXXXX")
serving=

clean_up() {
    if [ -n "$serving" ] && kill -0 "$serving" 2>/dev/null; then
        kill "$serving"
        wait "$serving" || true
    fi
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# What pip was told, and has downloaded before, is not a newcomer's home but the machine's network.
if [ -n "${HOME:-}" ]; then
    export PIP_CACHE_DIR="${PIP_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/pip}" npm_config_cache="${npm_config_cache:-$HOME/.npm}"
    for file in "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do
        [ -z "${PIP_CONFIG_FILE:-}" ] && [ -f "$file" ] && export PIP_CONFIG_FILE="$file"
    done
fi
export HOME="$work/home" PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir "$HOME"
unset PYTHONPATH VIRTUAL_ENV XDG_CACHE_HOME XDG_CONFIG_HOME KVRELAY_CONFIG KVRELAY_GATEWAY KVRELAY_REDIS_URL

# check TITLE COMMAND...: runs it, and says whether it went well.
check() {
    local title=$1 begin=$SECONDS result=0
    shift
    # Not in a condition: there `set -e` would not hold in functions, and only their last command would count.
    set +e
    (
        set -e
        "$@"
    ) >"$work/log" 2>&1 </dev/null
    result=$?
    set -e
    if [ $result = 0 ]; then
        echo "ok    $title ($((SECONDS - begin)) s)"
    else
        echo "FAIL  $title: $*"
        echo "(ended with $result)"
        tail -n 60 "$work/log"
        if [ -n "$serving" ]; then
            echo "--- the end of what serve all said"
            tail -n 30 "$work/serve.log"
        fi
        exit 1
    fi
}

# says WORDS COMMAND...: it ends well, and its output has the words.
says() {
    local words=$1
    shift
    "$@" | tee "$work/output"
    grep -qi -- "$words" "$work/output"
}

# Without compiling all modules, most of which are never imported: that takes longer than everything else.
install_as_the_readme_says() {
    "$python" -m venv "$work/venv"
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        "$work/venv/bin/pip" install -q --no-compile --extra-index-url "$TORCH_INDEX_URL" '.[worker,embedded,openai]'
    else
        # The version that tests run with, of which pip may have a CPU build at hand; a newer one would be gigabytes of CUDA.
        "$work/venv/bin/pip" install -q --no-compile "$(grep '^torch==' constraints.txt)"
        "$work/venv/bin/pip" install -q --no-compile '.[worker,embedded,openai]'
    fi
}

install_a_wheel() {
    "$python" -m venv "$work/wheel-venv"
    "$work/wheel-venv/bin/pip" wheel -q --no-deps -w "$work/dist" .
    "$work/wheel-venv/bin/pip" install -q --no-compile "$work"/dist/kvrelay-*.whl
}

# The names of kvrelay's own packages; who imports these ends.
make_a_folder_that_clashes() {
    local name
    for name in gateway benchmarks prefill_worker decode_worker; do
        mkdir -p "$work/project/$name"
        echo "raise SystemExit('the package $name of the current folder was imported')" >"$work/project/$name/__init__.py"
    done
}

wait_until_ready() {
    local deadline=$((SECONDS + 300))
    until grep -q 'ready: the gateway is' "$work/serve.log"; do
        kill -0 "$serving" && [ $SECONDS -lt $deadline ] || return 1
        sleep 0.2
    done
}

client_of_the_wheel() {
    cd "$work/project"
    "$work/wheel-venv/bin/python" -c "
from kvrelay.client import Client
with Client('$gateway') as client:
    answer = client.complete('The capital of France is', max_tokens=8, temperature=0)
    print(answer.outputs[0].text)
    assert 'Paris' in answer.outputs[0].text
"
}

# A program, with two lines to read where it reads any; OpenAI's client is in an environment of its own. Or a folder of tests.
run_example() {
    local python=$work/venv/bin/python
    if [ -d "$1" ]; then
        "$python" -m pip install -q pytest pytest-asyncio
        cd "$1"
        "$python" -m pytest -q
        return
    fi
    grep -q '^from openai' "$1" && python=$work/others/openai/bin/python
    printf 'The capital of France is\nOnce upon a time\n' | "$python" "$1"
}

main() {
    check "README: pip install in a new environment" install_as_the_readme_says
    check "a wheel in another one" install_a_wheel
    check "a wheel: kvrelay --version" "$work/wheel-venv/bin/kvrelay" --version
    check "a wheel: kvrelay protos" "$work/wheel-venv/bin/kvrelay" protos --to "$work/protos"
    check "a wheel installs one name" test ! -e "$("$work/wheel-venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/gateway"

    make_a_folder_that_clashes
    cd "$work/project"
    bin=$work/venv/bin
    "$bin/kvrelay" serve all --port "$port" --openai-port "$openai_port" >"$work/serve.log" 2>&1 </dev/null &
    serving=$!
    check "kvrelay serve all, in a folder with a package called gateway" wait_until_ready
    export KVRELAY_GATEWAY=$gateway
    check "kvrelay complete" says . "$bin/kvrelay" complete "The capital of France is" --max-tokens 16 --phases
    check "kvrelay complete --temperature 0" says Paris "$bin/kvrelay" complete "The capital of France is" --max-tokens 16 --temperature 0
    check "kvrelay status" says decode "$bin/kvrelay" status
    check "a wheel: a client" client_of_the_wheel
    cd "$root"
    check "kvrelay chat, on a terminal" says Paris "$python" -m tools.scripted_chat "$bin/kvrelay" chat
    "$python" -m tools.run_doc_examples --bin "$bin" --others "$work/others" --cwd "$work/project" \
        --gateway "$gateway" --openai "127.0.0.1:$openai_port" --http "127.0.0.1:$((port + 30))" \
        README.md docs/*.md docs/guides/*.md docs/reference/*.md docs/architecture/*.md

    # Examples are copied, so that addresses can be others and nothing is written into the checkout.
    if [ -d examples ]; then
        cp -r examples "$work/examples"
        find "$work/examples" -type f -exec sed -i "s/127\.0\.0\.1:50050/$gateway/g; s/127\.0\.0\.1:8000/127.0.0.1:$openai_port/g" {} +
        cd "$work/examples"
        for example in *.py */pytest.ini; do
            [ -f "$example" ] || continue
            check "examples/$example" run_example "${example%/pytest.ini}"
        done
        cd "$root"
    fi
    kill -INT "$serving"
    result=0
    wait "$serving" || result=$?
    serving=
    check "kvrelay serve all ends well" test $result = 0
    echo "all of it in $SECONDS s"
}

# As a function it is read as a whole: the file may change while it runs.
main
exit
