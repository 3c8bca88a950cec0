"""Classify pictures with an exported model: onnxruntime, NumPy and Pillow, and nothing of this package.

perceiver export RUN -o model.onnx && python examples/predict_with_onnx.py model.onnx FILE ...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
classes, options = json.loads(about["classes"]), json.loads(about["preparation"])["image"]["options"]
(height, width), (down, across) = options["size"], options["patch"]


def prepare(path: str) -> np.ndarray:
    """Return (height / patch, width / patch, c) float32 in 0..255: the centre of a picture, cut into patches."""
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
    (probabilities,) = session.run(["probabilities"], {"image": prepare(path)[None]})
    best = int(probabilities[0].argmax())
    print(json.dumps({"path": path, "label": classes[best], "prob": float(probabilities[0, best])}))
