#!/usr/bin/env bash
# Predictions in shell pipelines: lists in, JSON lines out, status that can be trusted.
#   examples/predict_in_a_pipe.sh MODEL FOLDER
set -euo pipefail
model=$1
folder=$2

# How many files of each predicted class? Names may hold anything, hence NUL.
find "$folder" -name '*.png' -print0 |
    perceiver predict -m "$model" --files-from - -0 --top-k 1 |
    python -c '
import collections, json, sys
for label, count in collections.Counter(json.loads(line)["label"] for line in sys.stdin).most_common():
    print(count, label)'

# Bytes on stdin: what a camera, sox or curl would send.
first=$(find "$folder" -name '*.png' | sort | head -n 1)
perceiver predict -m "$model" --stdin-name camera - < "$first"

# A bad input is a line with its error, and status 3; the good ones are answered all the same.
perceiver predict -m "$model" "$first" /dev/null --format csv --top-k 1 2>/dev/null || echo "status $?"
