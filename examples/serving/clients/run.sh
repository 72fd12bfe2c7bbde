#!/usr/bin/env bash
# Asks `kmerge-mlx serve` through every client here, and prints what each of them got:
#   bash examples/serving/clients/run.sh [FOLDER]
# The clients are installed into FOLDER (by default a temporary one), never beside this project.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../../..
if [ $# -gt 0 ]; then mkdir -p "$1"; work=$(cd "$1" && pwd); else work=$(mktemp -d); fi

for name in requirements requirements-llama-index requirements-instructor; do
  [ -d "$work/$name" ] || python3 -m venv "$work/$name"
  "$work/$name/bin/pip" install --quiet -r "$here/$name.txt"
done
# Node looks for packages in the folders above a script.
mkdir -p "$work/examples/serving/clients"
cp "$here/../../tree.txt" "$work/examples/"
cp "$here"/*.mjs "$work/examples/serving/clients/"
cp "$here/package.json" "$work/"
(cd "$work" && npm install --silent --no-audit --no-fund)

# The bundled model, with a template that writes tools.
mkdir -p "$work/bundled"
cp "$root"/kmerge_mlx/bundled/base/* "$here/chat_template.jinja" "$work/bundled/"
kmerge-mlx serve --model "$work/bundled" --adapter-path bundled --k 4 --apply-chat-template \
  --port 0 2> "$work/serve.log" &
server=$!
trap 'kill $server; wait $server || true' EXIT
until url=$(grep -aoE 'http://[^ ]*/v1' "$work/serve.log"); do
  kill -0 $server
  sleep 0.2
done
export BASE_URL=$url

python=$work/requirements/bin/python
failed=0
ask() {
  printf '\n%s\n' "$1"
  shift
  "$@" | tee "$work/found.txt" | awk -F '\t' '{ printf "  %-7s%-26s%.80s\n", $1, $2, $3 }'
  if grep -q '^FAILED' "$work/found.txt"; then failed=1; fi
}
ask "openai" "$python" "$here/openai_client.py"
ask "llm" "$python" "$here/llm_client.py"
ask "litellm" "$python" "$here/litellm_client.py"
ask "langchain-openai" "$python" "$here/langchain_client.py"
ask "pydantic-ai" "$python" "$here/pydantic_ai_client.py"
ask "instructor" "$work/requirements-instructor/bin/python" "$here/instructor_client.py"
ask "llama-index" "$work/requirements-llama-index/bin/python" "$here/llama_index_client.py"
ask "openai on Node" node "$work/examples/serving/clients/openai_client.mjs"
ask "AI SDK" node "$work/examples/serving/clients/ai_sdk_client.mjs"
exit $failed
