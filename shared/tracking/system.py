"""The machine's load, sampled beside a run under the names of MLflow's "System metrics" tab."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping


class SystemMonitor:
    """A thread that reports the load every `interval` seconds, and once more when it is stopped."""

    def __init__(self, report: Callable[[Mapping[str, float], int], None], interval: float) -> None:
        self._report = report
        self._interval = interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Report a last time and end the thread."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        # The first call measures since the process began, later ones since the call before.
        psutil.cpu_percent()
        process.cpu_percent()
        step = 0
        while True:
            stopped = self._stopped.wait(self._interval)
            memory = psutil.virtual_memory()
            load = {
                "cpu_utilization_percentage": psutil.cpu_percent(),
                "system_memory_usage_megabytes": memory.used / 1e6,
                "system_memory_usage_percentage": memory.percent,
                "process_cpu_utilization_percentage": process.cpu_percent(),
                "process_memory_megabytes": process.memory_info().rss / 1e6,
            }
            self._report({f"system/{name}": round(value, 1) for name, value in (load | _gpu_load()).items()}, step)
            if stopped:
                return
            step += 1


def _gpu_load() -> dict[str, float]:
    """Memory and, where NVML's binding is installed, utilization of the GPUs; empty in a process that uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    load = {}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        load[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / 1e6
        load[f"gpu_{index}_memory_usage_percentage"] = 100 * (total - free) / total
        try:
            load[f"gpu_{index}_utilization_percentage"] = float(torch.cuda.utilization(index))
        except (ImportError, RuntimeError):  # no binding, or a device that does not report it
            continue
    return load
