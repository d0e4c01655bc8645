"""`Variant`: one way in which a launch calls its kernel, for the ahead-of-time compiler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from triton.compiler import ASTSource

ELEMENT_BYTES = {"u8": 1, "bf16": 2, "fp16": 2, "i32": 4, "u32": 4, "fp32": 4, "i64": 8, "fp64": 8}
ROLLOUTS, TOKENS, GROUPS = 4096, 2048, 256  # the batch for which memory traffic is counted


@dataclass(frozen=True)
class Variant:
    """One way to call a kernel.

    Attributes:
        name: unique within the kernel.
        kernel: the jit function.
        pointers: the element type of each pointer argument; pointers that are not listed are None. All are 16-byte aligned, as
            torch allocates them.
        constants: the constexpr arguments.
    """

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, int | bool]

    def but(self, name: str, constants: dict[str, int | bool] | None = None, **pointers: str) -> Variant:
        return replace(self, name=name, pointers=self.pointers | pointers, constants=self.constants | (constants or {}))

    def source(self) -> ASTSource:
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned = []
        for parameter in self.kernel.params:
            name = parameter.name
            if parameter.is_constexpr or (name.startswith("p_") and name not in self.pointers):
                signature[name] = "constexpr"
                constants[name] = self.constants.get(name)
            elif name.startswith("p_"):
                signature[name] = "*" + self.pointers[name]
                aligned.append(parameter.num)
            else:
                signature[name] = parameter.annotation_type or "i32"
                if name == "T":
                    aligned.append(parameter.num)
        attributes = {(num,): [["tt.divisibility", 16]] for num in aligned}
        return ASTSource(self.kernel, signature, constants, attributes)

    def element_bytes(self) -> dict[str, int]:
        """The bytes of an element of each pointer argument."""
        return {name: ELEMENT_BYTES[element] for name, element in self.pointers.items()}
