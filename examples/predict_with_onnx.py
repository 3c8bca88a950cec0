"""Classify files with an exported model: onnxruntime, NumPy and Pillow, and nothing of this package.

perceiver export RUN -o model.onnx
python examples/predict_with_onnx.py model.onnx PICTURE ...

A model of sound, clouds, video or several modalities takes arrays that the program prepares:

perceiver preprocess -m RUN FILE ... --model-input -o inputs.npz > names.jsonl
python examples/predict_with_onnx.py model.onnx inputs.npz
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
classes, names = json.loads(about["classes"]), [each.name for each in session.get_inputs()]


def answers(inputs: dict[str, np.ndarray]) -> list[dict[str, object]]:
    """Return the label and its probability of each row of the graph's inputs."""
    (probabilities,) = session.run(["probabilities"], {name: inputs[name] for name in names})
    best = probabilities.argmax(axis=1)
    return [{"label": classes[k], "prob": float(row[k])} for k, row in zip(best, probabilities, strict=True)]


def prepare(path: str) -> np.ndarray:
    """Return (height / patch, width / patch, c) float32 in 0..255: the centre of a picture, cut into patches."""
    options = json.loads(about["preparation"])["image"]["options"]
    (height, width), (down, across) = options["size"], options["patch"]
    picture = ImageOps.exif_transpose(Image.open(path)).convert("L" if options["color"] == "grey" else "RGB")
    crop_width = max(1, int(options["eval_crop"] * min(picture.width, picture.height * width / height)))
    crop_height = max(1, int(options["eval_crop"] * min(picture.height, picture.width * height / width)))
    left, top = (picture.width - crop_width) // 2, (picture.height - crop_height) // 2
    picture = picture.crop((left, top, left + crop_width, top + crop_height))
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    rows, columns = height // down, width // across
    pixels = pixels[: rows * down, : columns * across].reshape(rows, down, columns, across, -1)
    return np.asarray(pixels.transpose(0, 2, 1, 3, 4).reshape(rows, columns, -1))


for path in sys.argv[2:]:
    if path.endswith(".npz"):
        for number, answer in enumerate(answers(dict(np.load(path)))):
            print(json.dumps({"row": number, **answer}))
    elif names == ["image"]:
        print(json.dumps({"path": path, **answers({"image": prepare(path)[None]})[0]}))
    else:
        wanted = " and ".join(names)
        sys.exit(f"this model takes {wanted}: perceiver preprocess -m RUN {path} --model-input -o inputs.npz")
