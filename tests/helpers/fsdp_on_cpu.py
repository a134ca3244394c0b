"""Run stages under real FSDP 2 (or DDP) on the CPU, one after another, in the processes of one launch:

    ACCELERATE_USE_CPU=true accelerate launch --config_file fsdp_config.yaml --num_processes 2 \\
        tests/helpers/fsdp_on_cpu.py JOBS.json

accelerate switches FSDP on for GPUs only: with this variable it starts the processes and hands them the settings of the
YAML file, but trains with DDP. So its state is completed here as `AcceleratorState.__init__` does on GPUs, and nothing
else is replaced but the size of a GPU's memory; the stages run through their own `main`. With LOCAL_WORLD_SIZE in `env`
the processes are those of several nodes with so many each.

JOBS.json: a list of
    script   str, a stage of the repository
    argv     list of str, its flags
    env      dict, environment variables of this job
    fsdp     bool; otherwise it is DDP, as accelerate has it here, and `report` tells the exit codes alone
    report   str, where the first process writes what it saw (JSON):
             distributed_type    str
             shards              parameter -> [shape, local shape] if it is sharded, else null
             mesh                of the processes, by the name of each dimension its size
             timeout             with which they wait for each other
             units               names of the modules that are gathered one by one
             policies            their mixed precision, as text
             loaded_norms        of the embeddings before sharding, one a process
             logits_dtypes, logps_dtypes     of all forward passes
             gathers, reductions             of parameters and of gradients, on the first process
             exit_codes          of the stage, one a process
"""

import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from training import logps, models  # noqa: E402

# By which FSDP 2 gathers parameters and reduces gradients, by their names of torch 2.13 and before.
COLLECTIVES = {
    "gathers": ("all_gather_single", "all_gather_into_tensor"),
    "reductions": ("reduce_scatter_single", "reduce_scatter_tensor"),
}
seen = {}


class FSDPAccelerator(Accelerator):
    """What `Accelerator()` is on GPUs under fsdp_config.yaml; notes what becomes of the model."""

    def __init__(self, parallelism_config=None, **settings):
        super().__init__(**settings)
        plugin = FullyShardedDataParallelPlugin()
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state |= {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        if parallelism_config:
            self.state.parallelism_config = parallelism_config
            self.state.device_mesh = parallelism_config.get_device_mesh("cpu")
            parallelism_config._validate_accelerator(self)

    def prepare(self, *args):
        norm = args[0].get_input_embeddings().weight.norm().item()
        prepared = super().prepare(*args)
        model = prepared[0] if isinstance(prepared, (tuple, list)) else prepared
        seen["timeout"] = str(torch.distributed.group.WORLD._get_backend(self.device).options._timeout)
        seen["distributed_type"] = self.distributed_type.value
        seen["loaded_norms"] = gather_object([norm])
        seen["shards"] = {
            name: [list(value.shape), list(value.to_local().shape)] if isinstance(value, DTensor) else None
            for name, value in model.named_parameters()
        }
        mesh = next(model.parameters()).device_mesh if isinstance(next(model.parameters()), DTensor) else None
        seen["mesh"] = dict(zip(mesh.mesh_dim_names or ["all"], mesh.shape)) if mesh else None
        units = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
        seen["units"] = list(units)
        seen["policies"] = {str(module._get_fsdp_state()._mp_policy) for module in units.values()}
        return prepared


def note_dtype(sum_by_owner):
    def noted(token_logps, *args):
        seen.setdefault("logps_dtypes", set()).add(str(token_logps.dtype))
        return sum_by_owner(token_logps, *args)

    return noted


def count_calls(name, what):
    """Count the calls of a function of torch.distributed."""
    original = getattr(torch.distributed, name)

    def counted(*args, **kwargs):
        seen[what] = seen.get(what, 0) + 1
        return original(*args, **kwargs)

    setattr(torch.distributed, name, counted)


def reset():
    """The next Accelerator begins anew, in the same group of processes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(job):
    """Exit code of one job."""
    sys.argv = [job["script"], *job["argv"]]
    try:
        runpy.run_path(str(ROOT / job["script"]), run_name="__main__")
    except SystemExit as error:
        return error.code
    return 0


def main(jobs_path):
    PartialState.destroy_process_group = lambda self, group=None: None  # only after the last job
    logps.sum_by_owner = note_dtype(logps.sum_by_owner)
    for what, names in COLLECTIVES.items():
        count_calls(next(name for name in names if hasattr(torch.distributed, name)), what)
    for job in json.loads(Path(jobs_path).read_text()):
        os.environ |= {
            name: str(value).lower() if isinstance(value, bool) else value for name, value in job["env"].items()
        }
        models.Accelerator = FSDPAccelerator if job["fsdp"] else Accelerator
        models.gpu_memory = lambda: 2**40 * job["fsdp"]
        reset()
        seen.clear()
        code = run(job)
        seen["exit_codes"] = gather_object([code])
        if PartialState().is_main_process:
            Path(job["report"]).write_text(json.dumps(seen, default=sorted))
    # Both are done, every report is on disk: leave without taking down the groups of all jobs, in the last of which
    # training was refused between backward and step. Gloo's threads then abort now and then.
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
