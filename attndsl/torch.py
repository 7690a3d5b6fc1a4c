"""`import attndsl.torch` registers the operators `attndsl::attend` and `attndsl::attend_paged`: what a
process needs to load a program that was saved by torch.export or AOTInductor. `import attndsl` alone stays
free of torch."""

from attndsl.execution.operator import attend as attend
from attndsl.execution.paged import attend_paged as attend_paged
