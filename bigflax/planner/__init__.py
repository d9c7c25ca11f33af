"""Planning: what a step will need and how fast it can be, on chips that are not here.

    mesh = bigflax.make_mesh(devices=topology.devices("v5e:4x4"), fsdp=-1)
    state = bigflax.state_like(model.init, tx, mesh=mesh, axes=model.axes)             nothing is allocated
    print(bigflax.plan(bigflax.train_step(loss_fn, tx, state), state, batch).table())

`plan` lowers the step, lets the TPU compiler compile it, and reads off the program what it says of itself: the memory of a chip, and every
collective with its bytes, how often it runs, and the mesh axis that it goes over (compiled.py). `estimate` says the same without a
compiler, in a second (analytic.py); `search` ranks meshes, remat policies and micro-batches by it and compiles the best (search.py).
Both become a `Plan` (report.py), whose time is the roofline's (roofline.py).

Left out on purpose: simulation of the schedule (what overlaps in truth), and the host's side of a run (input, checkpoints).
"""

from bigflax.planner.analytic import Trace, estimate, trace
from bigflax.planner.compiled import plan
from bigflax.planner.report import GIB, Plan, Traffic
from bigflax.planner.search import Choice, ranked, table, tried

__all__ = ["GIB", "Choice", "Plan", "Trace", "Traffic", "estimate", "plan", "ranked", "table", "trace", "tried"]
