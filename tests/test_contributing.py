"""What CONTRIBUTING.md shows is a change that works."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

TRY = """
import sys
import v05.methods
exec(open(sys.argv[1]).read(), vars(v05.methods))  # the changed table in the place of the installed one, for all that follows
import torch
from v05 import reference
from v05.ops import fused_advantage
rewards, ids = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), [0, 0, 0, 1, 1]
out = fused_advantage(rewards, group_ids=ids, num_groups=2, method="loo_batch", dtype=torch.float64)
wanted, _ = reference.advantages(rewards.numpy(), ids, method="loo_batch")
torch.testing.assert_close(out.advantages, torch.from_numpy(wanted))
assert out.advantages[0] > 0 > out.advantages[1]
print("works")
"""


def test_a_method_is_a_row(tmp_path):
    (diff,) = re.findall(r"```diff\n--- a/v05/methods.py.*?```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    context = next(line[1:] for line in diff.split("\n") if line.startswith("         Method"))
    added = next(line[1:] for line in diff.split("\n") if line.startswith("+        Method"))
    before = (ROOT / "v05" / "methods.py").read_text()
    assert before.count(context + "\n") == 1
    (tmp_path / "methods.py").write_text(before.replace(context + "\n", f"{context}\n{added}\n"))
    (tmp_path / "try.py").write_text(TRY)
    command = [sys.executable, str(tmp_path / "try.py"), str(tmp_path / "methods.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "works\n", done.stderr
