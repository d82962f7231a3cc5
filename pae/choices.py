"""The words that arguments take, where a function here and an option of `pae train` share them.

Nothing is imported, so that the command line can list and check them before torch is loaded.
"""

# what a run learns
TASKS = ("classification", "segmentation", "clip")

ENGINES = ("fast", "reference")
# whose rows of the last block a pooling readout takes
POOLS = ("image", "all", "prompts")
# the norm of a readout that was made to average
POOL_NORMS = ("fresh", "behind", "before")

KLD_MODES = ("global", "layerwise")
KLD_FORMULATIONS = ("code", "paper")
KLD_GAUGES = ("none", "layernorm")

MPA_HEADS = ("as_is", "linear_probe")
MPA_SEARCHES = ("exact", "halving")
MPA_PRECISIONS = ("exact", "bf16")

SPT_METHODS = ("random", "mean_pooling", "max_pooling", "kmeans")

# pixels of a training run
AUGMENTS = ("none", "crop", "timm")
NORMS = ("model", "imagenet", "inception", "none")
LEGACY = "tf1-bilinear"  # `pae.train.resize`
INTERPOLATIONS = ("model", "bilinear", "bicubic", LEGACY)
