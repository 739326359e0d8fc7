"""All checks of one machine, in the order of the table: what is quick first, what imports torch last."""

from collections.abc import Callable, Iterable
from typing import Any

from imitate_ds.diagnosis import machine, ranks, software, storage
from imitate_ds.diagnosis.finding import Check, Options, broken

CHECKS: dict[str, Check] = {
    "python": software.python_version,
    **{name: software.package_version(name) for name in software.PACKAGES},
    "open files": machine.open_files,
    "locked memory": machine.locked_memory,
    "processes": machine.processes,
    "shared memory": machine.shared_memory,
    "temporary folder": machine.temporary_folder,
    "host name": machine.host_name,
    "InfiniBand": machine.infiniband,
    "shards, in sequence": storage.sequential_read,
    "shards, at random": storage.random_read,
    "run folder, writing": storage.run_dir_write,
    "run folder, locks": storage.run_dir_rename_and_lock,
    "run folder, room": storage.run_dir_room,
    "run folder, access": storage.run_dir_access,
    "compilation locks": software.stale_locks,
    "accelerators": software.accelerators,
    "attention": software.attention,
    "Triton kernels": software.triton_kernels,
    "JPEG decoder": software.jpeg_decoder,
    "DICOM decoder": software.dicom_decoder,
    "apex": software.apex,
    "FusedAdam": software.fused_adam,
    "CPUAdam": software.cpu_adam,
}
# Where there is no launcher, ranks are started here.
ALONE: dict[str, Check] = {
    "gloo ranks": ranks.ranks_of_this_machine("cpu"),
    "NCCL ranks": ranks.ranks_of_this_machine("cuda"),
}


def run_checks(names: Iterable[str], options: Options, tell: Callable[[dict[str, Any]], None]) -> None:
    """Run checks one after another, and tell each finding as soon as it is there.

    A file or a device that is missing or refuses is a finding; whatever else is raised ends this process, and says so there.
    """
    for name in names:
        try:
            finding = (CHECKS | ALONE)[name](options)
        except OSError as error:
            finding = broken(str(error), "")
        tell(finding._replace(name=name)._asdict())
