"""The sound set of a new user's first afternoon: 2,717 spoken commands of 16 classes, made with espeak-ng and sox.

    python tests/slow/spoken_commands.py FOLDER [--share 0.1] [--train]

Classes have 12 to 500 files. Files have one of five sample rates, which says nothing about the class: 21 % have 8 kHz.
Nine files have faults: cut, empty, of text, silent, or copies of others. Each file is the same on every run of the same
espeak-ng and sox. Nothing of it is in the repository: both programs are packages of Debian.

--train then does what a new user would, in hours on two cores: train, then what training says about class weights.
"""

from __future__ import annotations

import argparse
import random
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from perceiver_cli.model.checkpoint import read_info

SIZES = {
    "lights on": 500, "lights off": 420, "open the door": 350, "close the door": 300, "volume up": 250,
    "volume down": 200, "play music": 160, "pause music": 130, "start": 110, "stop": 90, "yes": 70, "no": 50,
    "help": 36, "next": 24, "back": 15, "cancel": 12,
}  # fmt: skip
RATES = {8000: 0.21, 16000: 0.20, 22050: 0.20, 44100: 0.20, 48000: 0.19}  # share of the files
VOICES = [f"{accent}+{voice}" for accent in ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029")
          for voice in ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")]  # fmt: skip
NOISES = 8  # files of noise, of which each command gets a piece


def speak(text: str, seed: str, path: Path, noises: list[Path]) -> None:
    """Write one command: a voice, a speed, a pitch, a room and a noise, at one of RATES."""
    rng = random.Random(seed)
    voice = ["-v", rng.choice(VOICES), "-s", str(rng.randint(120, 210)), "-p", str(rng.randint(20, 80))]
    rate_hz = rng.choices(list(RATES), list(RATES.values()))[0]
    before, after, room = rng.uniform(0.05, 0.5), rng.uniform(0.05, 0.5), rng.randint(0, 30)
    noise, loudness, gain = rng.choice(noises), rng.uniform(0.003, 0.05), rng.uniform(-12, -1)
    start = rng.uniform(0, 20)
    spoken = subprocess.run(["espeak-ng", *voice, "--stdout", text], check=True, capture_output=True).stdout
    length_s = (len(spoken) - 44) / 2 / 22050 + before + after
    shaped = subprocess.run(
        ["sox", "-R", "-q", "-D", "-t", "wav", "--ignore-length", "-", "-t", "wav", "-", "norm", "-3",
         "pad", f"{before:.3f}", f"{after:.3f}", "reverb", str(room), "50", str(rng.randint(5, 60))],
        check=True, capture_output=True, input=spoken,
    ).stdout  # fmt: skip
    piece = subprocess.run(
        ["sox", "-q", str(noise), "-t", "wav", "-", "trim", f"{start:.3f}", f"{length_s:.3f}"],
        check=True, capture_output=True,
    ).stdout  # fmt: skip
    piece_path = path.with_suffix(".noise")
    piece_path.write_bytes(piece)
    subprocess.run(
        ["sox", "-R", "-q", "-m", "-v", "1", "-t", "wav", "--ignore-length", "-", "-v", f"{loudness:.3f}", "-t", "wav",
         str(piece_path), "-r", str(rate_hz), "-c", "1", "-b", "16", str(path), "gain", f"{gain:.1f}"],
        check=True, capture_output=True, input=shaped,
    )  # fmt: skip
    piece_path.unlink()


def plant_faults(folder: Path) -> None:
    """Write nine files that `perceiver lint` must find."""
    first, second, third = (sorted((folder / name).glob("*.wav")) for name in ("lights_on", "lights_off", "stop"))
    for number, path in enumerate(first[:2]):  # cut short, in the header or in a sample
        (folder / "lights_on" / f"cut{number}.wav").write_bytes(path.read_bytes()[: 30 + 9971 * number])
    (folder / "lights_on" / "empty.wav").write_bytes(b"")
    (folder / "stop" / "notes.wav").write_text("not a sound\n")
    for number in range(2):
        silence = ["sox", "-q", "-n", "-r", "16000", "-c", "1", "-b", "16"]
        quiet = folder / "stop" / f"silent{number}.wav"
        subprocess.run([*silence, str(quiet), "trim", "0", "1.5"], check=True)
    shutil.copy(second[0], folder / "lights_on" / "copy.wav")  # under another label
    shutil.copy(second[1], folder / "lights_off" / "copy.wav")
    shutil.copy(third[0], folder / "stop" / "copy.wav")


def make(folder: Path, share: float = 1.0, workers: int = 2) -> None:
    """Write `share` of the set as FOLDER/<class>/<number>.wav; every class keeps at least ten files."""
    folder.mkdir(parents=True)
    noises = []
    for number in range(NOISES):
        noises.append(folder / f"noise{number}.wav")
        kind = ("pink", "brown")[number % 2]
        noise = ["sox", "-R", "-q", "-n", "-r", "22050", "-c", "1", "-b", "16", str(noises[-1]), "synth", "30"]
        subprocess.run([*noise, f"{kind}noise", "norm", "-1"], check=True)
    with ThreadPoolExecutor(workers) as pool:
        jobs = []
        for text, size in SIZES.items():
            label = text.replace("the ", "").replace(" ", "_")
            (folder / label).mkdir()
            for number in range(max(10, round(size * share))):
                path = folder / label / f"{number:04d}.wav"
                jobs.append(pool.submit(speak, text, f"{label}/{number}", path, noises))
        for job in jobs:
            job.result()
    for noise in noises:
        noise.unlink()
    plant_faults(folder)


def train(folder: Path) -> float:
    """Train with the defaults, follow the first advice on class weights; return the validation accuracy."""
    command, model = ["train", str(folder), "-o", f"{folder}-run"], ""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "perceiver_cli", *command], capture_output=True, text=True, check=True
        )
        model = done.stdout.strip()
        said = [line for line in done.stderr.splitlines() if line.startswith("next: ")]
        print(*said, sep="\n")
        command = shlex.split(next((line for line in said if "class_weight" in line), "").partition(": perceiver ")[2])
        if not command:
            break
    return float(read_info(Path(model)).metrics["val_accuracy"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="share of each class's files")
    parser.add_argument("--train", action="store_true", help="train and follow the advice; fail below 0.92")
    arguments = parser.parse_args()
    make(arguments.folder, arguments.share)
    if arguments.train:
        reached = train(arguments.folder)
        print(f"validation accuracy {reached:.4f}")
        sys.exit(reached < 0.92)
