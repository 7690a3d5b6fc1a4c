"""`import attndsl.torch` registers the operator `attndsl::attend`: what a process needs to load a program
that was saved by torch.export or AOTInductor. `import attndsl` alone stays free of torch."""

from attndsl.execution.operator import attend as attend
