"""Independent checks of reduced programs, for the zoo and for the fuzzer."""

from tests.oracle.case import Case, make_case
from tests.oracle.checks import CHECKS, faults

__all__ = ["CHECKS", "Case", "faults", "make_case"]
