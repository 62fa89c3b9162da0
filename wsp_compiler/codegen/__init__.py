"""Code generation: TensorIR kernels for the lowered operators, their build, cache and launch.

Only this subpackage and ``wsp_compiler.runtime`` know tvm.
"""
