#!/usr/bin/env bash
# What `make demo` runs: real handwritten digits as PNG class folders, then train, evaluate, predict. No network.
#   examples/quickstart.sh [FOLDER] [LENGTH]      default: demo '--max-time 45s'
set -euo pipefail
examples=$(dirname "$0")
folder=${1:-demo}
length=${2:---max-time 45s}

echo "== 1,797 scikit-learn digits as PNG, in $folder/digits/{train,test}/<class>/" >&2
python "$examples/write_digits.py" "$folder/digits"

echo "== train ($length)" >&2
model=$(perceiver train "$folder/digits" -o "$folder/run" $length --replace)

echo "== evaluate on the test split" >&2
perceiver evaluate "$folder/digits" -m "$folder/run" -o "$folder/report"

echo "== predict single files, as JSON lines" >&2
find "$folder/digits/test" -name '1[0-4]00.png' |
    perceiver predict -m "$folder/run" --files-from - --top-k 2

cat >&2 <<END
== Everything is in $folder/
   $model   the model, alone enough to predict
   $folder/run/metrics.jsonl         what training measured
   $folder/run/config.toml           the recipe; perceiver train --config replays it
   $folder/report/                   report.html, metrics.json, predictions.jsonl, confusion.png
   Next: perceiver train YOUR_FOLDER, with class/file or train/class/file and test/class/file in it.
END
