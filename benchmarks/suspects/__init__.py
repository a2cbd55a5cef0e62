"""Does the contradiction find wrong data? Measured beside the usual tricks.

    python -m benchmarks.suspects            # train what has no line yet, then write the table
    python -m benchmarks.suspects --table    # the table from the lines that are there

The gate of ``npl.GatedFisher`` asks whether the tail of a batch contradicts its body at the last layer. A sample's own
share in that may name it as a suspect. This package scores every sample of a fixed training set, some of which have
wrong targets, and measures how well each score separates them: the area under the ROC curve (AUROC).

**The contradiction of sample i in one batch.** v_i is the gradient of its loss at the last linear layer's weights, over
the root of s, the running mean of ``mean |g_i|^2``. u is the running mean, over the batches *before* this one, of
``1/N`` times the sum of v_i over the body, ``|g_i|^2 <= s``. Inner products are in Adam's metric, also from the batches
before. Fixed before the runs, 18 variants of the score:

* what is taken: the cosine ``-<v_i, u> / (|v_i| |u|)``; the inner product ``-<v_i, u>``; the rank of the cosine in its
  batch;
* the decay of u: .9 or .98;
* the epochs over which the mean is taken: all, from the second on, the first half.

**Peers**, from the same training: a sample's loss, ``|g_i|`` at the outputs, ``|v_i|`` (as GraND: Paul et al. 2021,
"Deep learning on a data diet"), for labels the margin (AUM: Pleiss et al. 2020, "Identifying mislabeled data using the
area under the margin ranking"), each as the mean over the same three choices of epochs, and as of the last time that a
sample was seen. For labels also confident learning (Northcutt et al. 2021), by cleanlab from five-fold
cross-validation, in four variants; where cleanlab is not installed it is left out and the table says so.

Each family of scores chooses one variant for all problems, by the mean AUROC on validation seeds (2000 to 2003); the
learning rate of a problem is plain's best on validation images, clean ones, over the same seeds. Seeds 5000 to 5007
are reported. A training that is *gated* takes the dense twin of ``structure="gated"`` at the networks' outputs, as
``npl.newton_loss`` does; for labels and lists that is the step of ``npl.LossHook`` too (tested). For paths the hook
would step before the last softplus, where the last layer ends.
"""
