#!/usr/bin/env bash
# Asks a running `kmerge-mlx serve` with curl: kmerge-mlx serve & bash examples/serving/curl.sh
set -euo pipefail
url=${BASE_URL:-http://127.0.0.1:8080/v1}
key=(-H "Authorization: Bearer ${API_KEY:-none}")
tree=$(dirname "$0")/../tree.txt

curl -sf "${key[@]}" "$url/models"
echo

# The file as a JSON string: the only escapes it needs are those of its line breaks.
text=$(sed -e ':a' -e 'N' -e '$!ba' -e 's/\n/\\n/g' "$tree")
curl -sf "${key[@]}" "$url/chat/completions" -H "Content-Type: application/json" -d '{
  "messages": [{"role": "user", "content": "'"$text"'", "merge": true}],
  "max_tokens": 4
}'
echo

curl -sfN "${key[@]}" "$url/completions" -H "Content-Type: application/json" -d '{
  "prompt": "<merge>'"$text"'</merge>", "max_tokens": 4, "stream": true
}'

curl -sf "${key[@]}" "${url%/v1}/metrics" | grep -E '^kmerge_mlx_(prompt|compressed)_tokens_total'
