"""Pictures of the dashboards for docs/: a real service under load, a real Prometheus, headless Chromium.

`python -m deploy.dashboards.screenshots [SECONDS]`. Not part of CI. While the load runs, a prefill worker is killed
and comes back, and a decode worker drains, so that there is something to see.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deploy.dashboards.drawing import Line, page
from tests.e2e.oracle import make_checkpoint
from tests.e2e.service import Program, Service
from tests.telemetry.live import Load, Prometheus
from tests.telemetry.panels import BOARDS, fill_in, load

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
STEP_SECONDS = 2.0
WINDOW = "20s"
_TIGHT = ("--handoff.lease-seconds", "3", "--cache.pool-bytes", str(10 << 20))  # memory that fills up
_LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 180.0
    if missing := [tool for tool in ("prometheus", "chromium", "pngquant") if shutil.which(tool) is None]:
        print(f"apt-get install {' '.join(missing)}", file=sys.stderr)
        return 2
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder / "checkpoint")
        service = Service(folder / "checkpoint", folder)
        try:
            for board, (html, width, height) in _observe(service, folder, seconds).items():
                (folder / f"{board}.html").write_text(html)
                _shoot(folder / f"{board}.html", IMAGES / f"{board}.png", width, height)
        finally:
            service.close()
    return 0


def _observe(service: Service, folder: Path, seconds: float) -> dict[str, tuple[str, int, int]]:
    """Run the load and return every dashboard as a page with its size."""
    # What comes and goes needs ports that stay: the gateway knows its workers by address, as does Prometheus.
    workers: dict[str, Program] = {}
    for pod in ("tandem-prefill-0", "tandem-prefill-1", "tandem-decode-0", "tandem-decode-1"):
        workers[pod] = service.worker(pod.split("-")[1], *_TIGHT)
    for worker in workers.values():
        worker.wait_ready()
    of_role = {role: [w for pod, w in workers.items() if role in pod] for role in ("prefill", "decode")}
    gateway = service.gateway(of_role["prefill"], of_role["decode"], "--server.metrics-port", "0")
    prometheus = Prometheus(folder / "prometheus", {"tandem-gateway-0": gateway, **workers})
    try:
        began = time.time()
        traffic = Load(service, gateway, num_clients=8, max_prompt_tokens=1600, max_output_tokens=500)
        time.sleep(seconds / 3)
        _restart(service, workers["tandem-prefill-1"])
        time.sleep(seconds / 3)
        draining = workers["tandem-decode-1"]
        draining.process.terminate()
        time.sleep(seconds / 3)
        print(traffic.stop())
        ended = time.time()
        return {board: _draw(prometheus, load(board), began + 25, ended) for board in BOARDS}
    finally:
        prometheus.close()


def _restart(service: Service, worker: Program) -> None:
    """Kill a worker; one with the same addresses takes its place."""
    port, metrics_port = worker.address.rpartition(":")[2], str(worker.ready["metrics_port"])
    worker.kill()
    time.sleep(4)
    service.worker(worker.name, "--server.port", port, "--server.metrics-port", metrics_port, *_TIGHT)


def _draw(prometheus: Prometheus, board: dict[str, Any], began: float, ended: float) -> tuple[str, int, int]:
    lines: dict[int, list[Line]] = {}
    for number, panel in enumerate(board["panels"]):
        for target in panel.get("targets", ()):
            found = prometheus.query_range(fill_in(target["expr"], WINDOW), began, ended, STEP_SECONDS)
            legend = target.get("legendFormat", "")
            lines.setdefault(number, []).extend(_line(series, legend, began, ended) for series in found)
    return page(board, lines, began, ended)


def _line(series: dict[str, Any], legend: str, began: float, ended: float) -> Line:
    """Return a series on the whole raster, nan where there is none."""
    values = {round((at - began) / STEP_SECONDS): float(value) for at, value in series["values"]}
    num_steps = int((ended - began) / STEP_SECONDS) + 1
    points = [(began + step * STEP_SECONDS, values.get(step, math.nan)) for step in range(num_steps)]
    name = _LABEL.sub(lambda match: str(series["metric"].get(match[1], "")), legend)
    return Line(name, points)


def _shoot(html: Path, image: Path, width: int, height: int) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    where = [f"--window-size={width},{height}", f"--screenshot={image}", html.as_uri()]
    subprocess.run(["chromium", *flags, *where], check=True, timeout=120, stderr=subprocess.DEVNULL)
    subprocess.run(["pngquant", "--force", "--skip-if-larger", "--ext", ".png", "64", str(image)], check=True)


if __name__ == "__main__":
    sys.exit(main())
