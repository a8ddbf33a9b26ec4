"""Our stream of training batches beside its peers, and from object storage.

    python benchmarks/stream.py [--data DATA] [--streaming-python PYTHON] [--rounds 3] [--seconds 6]
                                [--workers 2] [--work FOLDER] [--only peers,storage,start]

All rows read the same JPEG files, decode them with the same decoder and make the same training
augmentation (default recipe: short side 480 to 800, crops, flips), with as many reader processes:
photographs of DATA/coco128, replicated, where given, and generated ones of 640x480. Each row runs
in a process of its own, the rows by turns; a figure is the median over the rounds, and a ratio the
median of the ratios within a round. Read the ratios: machines differ, and are shared.

alone       decoding and augmentation of images in memory: no reading, no batch, no hand-over
stream      ours, from local shards
files       torch's DataLoader over image files
webdataset  webdataset's pipeline over the same shards
mosaicml    mosaicml-streaming over its own shards of the same images; PYTHON is one that has it

From object storage one reader process is measured, so that the other core is the server's: a static
server and moto's S3, both on the loopback address with 30 ms added to each answer.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from pipeline.data.shards.preparing import prepare_source, shards_url
from pipeline.recipe import Data

NUM_IMAGES = 1000
SAMPLES_PER_SHARD = 50
LATENCY = 0.03
HERE = Path(__file__).resolve().parent


def data_of(root: Path, **given: Any) -> Data:
    """The recipe's data section over the images of a folder."""
    source = {
        "name": "train",
        "format": "coco",
        "images": "images",
        "annotations": "annotations.json",
    }
    settings = {"root": str(root), "train": [source], "samples_per_shard": SAMPLES_PER_SHARD}
    return Data.model_validate({**settings, "repeat_threshold": 0, "workers": 2, **given})


def write_photographs(root: Path, shared: Path) -> None:
    """Real photographs with their boxes, as often as makes `NUM_IMAGES`."""
    tree = json.loads((shared / "coco128/annotations/instances_train2017.json").read_text())
    boxes: dict[int, list[tuple[list[float], int]]] = {}
    for annotation in tree["annotations"]:
        if not annotation.get("iscrowd"):
            own = boxes.setdefault(annotation["image_id"], [])
            own.append((annotation["bbox"], annotation["category_id"]))
    found = []
    for image in tree["images"]:
        path = shared / "coco128/train2017" / image["file_name"]
        if path.is_file() and Image.open(path).mode == "RGB":
            found.append((path.read_bytes(), boxes.get(image["id"], [])))
    write_coco(root, [found[i % len(found)] for i in range(NUM_IMAGES)], tree["categories"])


def write_generated(root: Path) -> None:
    """Smooth noise of 640x480 with seven boxes each."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(100):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int64)
        noisy = smooth + rng.normal(0, 6, smooth.shape).astype(np.int64)
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        corners = rng.integers(0, (500, 380), (7, 2)).tolist()
        found.append((buffer.getvalue(), [([x, y, 120.0, 90.0], 1) for x, y in corners]))
    images = [found[i % len(found)] for i in range(NUM_IMAGES)]
    write_coco(root, images, [{"id": 1, "name": "thing"}])


def write_coco(
    root: Path, images: Sequence[tuple[bytes, list[tuple[list[float], int]]]], categories: Any
) -> None:
    """Images and boxes in COCO's form, and their shards."""
    (root / "images").mkdir(parents=True)
    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    for number, (data, boxes) in enumerate(images, start=1):
        name = f"{number:06d}.jpg"
        (root / "images" / name).write_bytes(data)
        width, height = Image.open(io.BytesIO(data)).size
        size = {"width": width, "height": height}
        tree["images"].append({"id": number, "file_name": name, **size})
        for box, category in boxes:
            annotation = {"id": len(tree["annotations"]) + 1, "image_id": number, "iscrowd": 0}
            area = {"area": box[2] * box[3], "bbox": box, "category_id": category}
            tree["annotations"].append(annotation | area)
    (root / "annotations.json").write_text(json.dumps(tree))
    data = data_of(root)
    prepare_source(data.train[0], data, lambda function, tasks: enumerate(map(function, tasks)))


def run_row(
    row: str, data: Data, url: str, arguments: argparse.Namespace, python: str, **env: str
) -> dict[str, float] | None:
    """One row in a process of its own; None where its package is not installed."""
    job = {"row": row, "data": data.model_dump(mode="json"), "url": url}
    job |= {"workers": data.workers, "seconds": arguments.seconds}
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [python, str(Path(__file__)), "--job", json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, **settings, **env},
        check=False,
    )
    if done.returncode:
        if "ModuleNotFoundError: No module named 'streaming'" in done.stderr:
            return None
        raise SystemExit(f"{row}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_job(text: str) -> None:
    """What the process of a row does."""
    import torch
    from stream_rows import ROWS, Case, ours

    torch.set_num_threads(1)
    job = json.loads(text)
    case = Case(Data.model_validate(job["data"]), job["url"], job["workers"], job["seconds"])
    name, _, start = job["row"].partition("@")
    print(json.dumps(ours(case, int(start)) if start else ROWS[name](case)), flush=True)
    os._exit(0)


def table(title: str, rounds: Sequence[dict[str, dict[str, float] | None]], base: str) -> None:
    """A Markdown table of the rows of some rounds, with the ratio of each to `base`."""
    print(f"\n{title}\n")
    print("| | images/s | of the first | CPU ms an image | range of the ratio |")
    print("|---|---|---|---|---|")
    for row in rounds[0]:
        found = [(each[row], each[base]) for each in rounds]
        pairs = [(own, first) for own, first in found if own is not None and first is not None]
        if not pairs:
            print(f"| {row} | not installed | | | |")
            continue
        ratios = [own["rate"] / first["rate"] for own, first in pairs]
        rate = statistics.median(own["rate"] for own, _ in pairs)
        cpu = statistics.median(own["cpu"] for own, _ in pairs) * 1000
        spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
        print(f"| {row} | {rate:.0f} | {statistics.median(ratios):.2f} | {cpu:.2f} | {spread} |")
    sys.stdout.flush()


def peers(root: Path, title: str, arguments: argparse.Namespace) -> None:
    """The first table: local shards, beside other readers."""
    data = data_of(root, workers=arguments.workers)
    url = shards_url(data, data.train[0])
    rounds = []
    for _ in range(arguments.rounds):
        results: dict[str, dict[str, float] | None] = {}
        for row in arguments.rows.split(","):
            python = arguments.streaming_python if row == "mosaicml" else sys.executable
            results[row] = run_row(row, data, url, arguments, python)
        rounds.append(results)
    table(f"{title}, {arguments.workers} reader processes", rounds, "alone")


@contextmanager
def static_server(folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    """A server of ranges, and its address."""
    command = [sys.executable, str(HERE / "range_server.py"), str(folder)]
    with subprocess.Popen(
        [*command, "--latency", str(LATENCY)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield psutil.Process(server.pid), f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


MOTO = """
import sys, time
from werkzeug.serving import make_server
from moto.server import DomainDispatcherApplication, create_backend_app
application = DomainDispatcherApplication(create_backend_app)
def late(environ, start_response):
    time.sleep(float(sys.argv[1]))
    return application(environ, start_response)
server = make_server("127.0.0.1", 0, late, threaded=True)
print(server.server_port, flush=True)
import logging; logging.getLogger("werkzeug").setLevel(logging.ERROR)
server.serve_forever()
"""
S3 = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@contextmanager
def s3_server(folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    """moto's S3 with the shards in a bucket, and its address."""
    with subprocess.Popen(
        [sys.executable, "-c", MOTO, str(LATENCY)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        import s3fs

        storage = s3fs.S3FileSystem(endpoint_url=address, key="test", secret="test")
        storage.mkdir("bucket")
        storage.put(str(folder / "shards" / "train"), "bucket/train", recursive=True)
        yield psutil.Process(server.pid), address
        server.kill()


def storage(root: Path, title: str, arguments: argparse.Namespace) -> None:
    """The second table: the same stream from servers with a latency."""
    local = data_of(root, workers=1)
    rounds, served = [], dict[str, list[float]]()
    for _ in range(arguments.rounds):
        url = shards_url(local, local.train[0])
        results = {"local": run_row("stream", local, url, arguments, sys.executable)}
        for kind, server in (("http", static_server), ("s3", s3_server)):
            with server(root) as (process, address):
                for how in ("ranges", "shards"):
                    cache = tempfile.mkdtemp(dir=root)
                    reading = {"how": how, "cache": cache}
                    url = f"{address}/shards/train" if kind == "http" else "s3://bucket/train"
                    env = {} if kind == "http" else {**S3, "AWS_ENDPOINT_URL": address}
                    data = data_of(root, workers=1, reading=reading)
                    cpu, begun = sum(process.cpu_times()[:2]), time.perf_counter()
                    row = f"{kind} {how}"
                    results[row] = run_row("stream", data, url, arguments, sys.executable, **env)
                    taken = time.perf_counter() - begun
                    used = (sum(process.cpu_times()[:2]) - cpu) / taken
                    served.setdefault(row, []).append(used)
                    shutil.rmtree(cache)
        rounds.append(results)
    table(f"{title}, 1 reader process, {LATENCY * 1000:.0f} ms to each answer", rounds, "local")
    for row, shares in served.items():
        print(f"server of {row}: {statistics.median(shares):.2f} CPU seconds a second")


def start(root: Path, title: str, arguments: argparse.Namespace) -> None:
    """How long the first batch takes, from the beginning and from far on."""
    print(f"\n{title}: seconds to the first step, {arguments.workers} reader processes\n")
    data = data_of(root, workers=arguments.workers)
    url = shards_url(data, data.train[0])
    for step in (0, 1_000, 1_000_000, 1_000_000_000):
        firsts = []
        for _ in range(arguments.rounds):
            quick = argparse.Namespace(**{**vars(arguments), "seconds": 0.1})
            result = run_row(f"stream@{step}", data, url, quick, sys.executable)
            assert result is not None
            firsts.append(result["first"])
        print(f"from step {step}: {statistics.median(firsts):.2f}", flush=True)


def main() -> None:
    """Write the images, run the rows, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--streaming-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep images and shards here")
    parser.add_argument("--only", default="peers,storage,start")
    parser.add_argument("--sets", default="photographs,generated")
    parser.add_argument("--rows", default="alone,stream,files,webdataset,mosaicml")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        run_job(arguments.job)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        roots = {"generated 640x480": work / "generated"}
        if arguments.data is not None:
            roots = {"photographs": work / "photographs", **roots}
        for title, root in roots.items():
            if title.split()[0] not in arguments.sets.split(","):
                continue
            if not (root / "annotations.json").exists():
                if root.name == "photographs":
                    write_photographs(root, arguments.data)
                else:
                    write_generated(root)
            for part in arguments.only.split(","):
                {"peers": peers, "storage": storage, "start": start}[part](root, title, arguments)


if __name__ == "__main__":
    main()
