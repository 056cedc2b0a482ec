"""Where and how a computation runs: backend, precision, device, memory."""

from __future__ import annotations

from dataclasses import dataclass

from ntkbench.errors import BadInput, unknown

BACKENDS = ("torch", "jax")
DTYPES = ("float32", "float64")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Target:
    """Backend, precision, device and memory of one computation.

    Attributes:
        backend: ``"torch"`` or ``"jax"``.
        dtype: ``"float32"`` for speed, ``"float64"`` for truth.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` (the GPU where the backend sees one).
        memory: bytes that blocks of passes and of rows may fill; what does not fit is done in further blocks.
        program_memory: bytes that one compiled program may take, where that is known before it runs; ``None`` for 80 %
            of what is free on the device.
    """

    backend: str = "torch"
    dtype: str = "float32"
    device: str = "auto"
    memory: int = 2**30
    program_memory: int | None = None

    def __post_init__(self) -> None:
        for kind, value, allowed in (
            ("backend", self.backend, BACKENDS),
            ("dtype", self.dtype, DTYPES),
            ("device", self.device, DEVICES),
        ):
            if value not in allowed:
                raise unknown(kind, value, allowed)
        if self.memory <= 0:
            raise BadInput(f"memory must be a positive number of bytes, got {self.memory}")

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return 4 if self.dtype == "float32" else 8
