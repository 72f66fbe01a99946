#!/usr/bin/env bash
# Runs every example in a folder of its own; the first that fails ends it.
set -euo pipefail
examples=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python "$examples/own_data/make_data.py" runs/lights
peft-mllm data check runs/lights/train.jsonl
peft-mllm train "$examples/own_data/spec.yaml"
python "$examples/own_method.py"
python "$examples/python_api.py" runs/python-api

python "$examples/import_results/make_results.py" runs/results.csv
peft-mllm study report runs/results.csv
peft-mllm advise --model my-model --task charts --results runs/results.csv
