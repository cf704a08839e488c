"""The five programs of the product document, as they were before they were copied, sent to an app of ours."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.shared import SHARED

DOCUMENT = SHARED / "reference" / "create-a-tune.txt"
KEY = "sd_a-key-of-our-own"
PHOTO_URL = "https://i.imgur.com/HLHBnl9.jpeg"
HOSTS = ("http://localhost:3000", "https://api.astria.ai")
CALLBACK_HOST = "https://optional-callback-url.com/"
SAMPLES = {  # where each begins and ends
    "curl with files": ("# With imags", "# With image_urls as form-data"),
    "curl with image_urls": ("# With image_urls as form-data", "# As JSON"),
    "curl with JSON": ("# As JSON", "// NodeJS 16"),
    "node": ("// NodeJS 16", "import requests"),
    "python": ("import requests", "Response"),
}


def mended(document: str, name: str) -> str:
    """A program of the document, as it was before it was copied."""
    begin, end = SAMPLES[name]
    text = document[document.index("POST /tunes\n") :]
    text = text[text.index(begin) : text.index(end, text.index(begin) + len(begin))]
    for number in range(1, 5):
        text = text.replace("[email protected]", f"=@{number}.jpg", 1)  # `tune[images][]=@1.jpg`
    text = text.replace('import fetch from "node-fetch";\n', "")
    return text.replace(":\nwith open", ":\n  with open").replace("as f:\nreturn", "as f:\n    return")


def to_us(program: str, url: str, photo_url: str, callbacks: str) -> str:
    for host in HOSTS:
        program = program.replace(host, url)
    program = program.replace(PHOTO_URL, photo_url).replace(CALLBACK_HOST, callbacks).replace("sd_XXXXXX", KEY)
    if '"branch"' in program:
        return program
    program = re.sub(r'(-F "tune\[title\])', r'-F "tune[branch]=fast" \1', program)
    return re.sub(r'("title": (\'[^\']*\'|"[^"]*"),)', r'\1 "branch": "fast",', program)


def run(program: str, name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in its language, in a folder of its own."""
    if name.startswith("curl"):
        told = program.replace("curl ", "curl -sS -w '\\n%{http_code}\\n' ")
        command = ["bash", "-c", told]
    elif name == "node":
        (folder / "sample.mjs").write_text(program)
        command = ["node", "sample.mjs"]
    else:
        (folder / "sample.py").write_text(f"{program}\nprint(response.status_code)\nprint(response.text)")
        command = [sys.executable, "sample.py"]
    env = {"API_KEY": KEY, "PATH": "/usr/bin:/bin:/usr/local/bin"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=True)
