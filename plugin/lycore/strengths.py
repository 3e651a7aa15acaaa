"""The user's numbers for one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_char_p, c_double, sizeof
from dataclasses import dataclass, field

from ._binding import lycore_strengths
from .errors import ArgumentError


@dataclass(frozen=True)
class Strengths:
    """1 is the usual strength, 0 is none, negative ones are allowed.

    `modules` maps names as the file spells them, `*` standing for any text, to strengths; the last match wins over
    the two numbers.
    """

    unet: float = 1.0
    text_encoder: float = 1.0
    modules: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        strength: float | Strengths = 1.0,
        unet: float | None = None,
        text_encoder: float | None = None,
        modules: Mapping[str, float] | None = None,
    ) -> Strengths:
        """`strength` everywhere, save where one of the others is given."""
        base = strength if isinstance(strength, Strengths) else cls(float(strength), float(strength))
        return cls(
            base.unet if unet is None else float(unet),
            base.text_encoder if text_encoder is None else float(text_encoder),
            dict(base.modules if modules is None else modules),
        )

    def fill(self, target: lycore_strengths) -> None:
        """Writes the numbers into a C struct, which keeps the arrays that it points to alive."""
        target.struct_size = sizeof(lycore_strengths)
        target.unet, target.text_encoder, target.module_count = self.unet, self.text_encoder, len(self.modules)
        if self.modules:
            try:
                target.module_patterns = (c_char_p * len(self.modules))(*(name.encode() for name in self.modules))
                target.module_strengths = (c_double * len(self.modules))(*self.modules.values())
            except (AttributeError, TypeError) as problem:
                raise ArgumentError(f"modules must map names to numbers: {problem}") from problem

    def c(self) -> lycore_strengths:
        """As a C struct."""
        struct = lycore_strengths()
        self.fill(struct)
        return struct
