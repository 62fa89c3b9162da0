"""The compiler passes, in order. This file is the whole lowering on one screen.

pipeline.before("lower_winograd", MyPass())     a pass of your own
pipeline.without("fuse_epilogue")               one pass less
"""

from __future__ import annotations

from wsp_compiler.passes.assign_layout import AssignLayout
from wsp_compiler.passes.base import Pass, PassBase, PassRecord, Rewrites
from wsp_compiler.passes.choose_keep import ChooseKeep
from wsp_compiler.passes.fold_batch_norm import FoldBatchNorm
from wsp_compiler.passes.fold_conv_batch_norm import FoldConvBatchNorm
from wsp_compiler.passes.fuse_conv_epilogue import FuseConvEpilogue
from wsp_compiler.passes.fuse_epilogue import FuseEpilogue
from wsp_compiler.passes.lower_winograd import LowerWinograd
from wsp_compiler.passes.merge_stages import MergeStages
from wsp_compiler.passes.pipeline import Pipeline, run_pipeline
from wsp_compiler.passes.sink_epilogue import SinkEpilogue

pipeline = Pipeline(
    (
        ChooseKeep(),  # write each SitePlan to its node, register `keep`
        LowerWinograd(),  # convolution -> input_transform, sparse_bgemm, output_transform
        FoldBatchNorm(),  # batch norm -> scaled rows of U and a bias
        FoldConvBatchNorm(),  # the same for convolutions left to the vendor's library
        FuseEpilogue(),  # residual add and activation -> output_transform
        MergeStages(),  # the three stages -> one winograd_conv2d
        FuseConvEpilogue(),  # the same epilogue for convolutions left to the vendor's library
        AssignLayout(),  # images stay channels_last where nobody minds
    )
)
inductor_pipeline = pipeline.after("fuse_conv_epilogue", SinkEpilogue())
"""For rest="inductor"."""

__all__ = [
    "AssignLayout",
    "ChooseKeep",
    "FoldBatchNorm",
    "FoldConvBatchNorm",
    "FuseConvEpilogue",
    "FuseEpilogue",
    "LowerWinograd",
    "MergeStages",
    "Pass",
    "PassBase",
    "PassRecord",
    "Pipeline",
    "Rewrites",
    "SinkEpilogue",
    "inductor_pipeline",
    "pipeline",
    "run_pipeline",
]
