"""attndsl: a compiler for attention mechanisms."""

from attndsl.assertions import Assertion as Assertion
from attndsl.assertions import prove as prove
from attndsl.attention import Attention as Attention
from attndsl.errors import AttnError as AttnError
from attndsl.plan import Plan as Plan
from attndsl.plan import compile as compile
from attndsl.program import Program as Program
from attndsl.program import load as load
from attndsl.program import parse as parse
