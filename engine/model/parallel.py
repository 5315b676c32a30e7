"""Several processes: gradients are averaged over them, and the frozen reference is shared out."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def data_parallel(policy):
    """Average the policy's gradients over the ranks in each backward pass.

    With gradient_as_bucket_view gradients live in DDP's buckets, not in a second copy. DDP rebuilds its buckets after
    the first backward pass, and briefly holds both, unless their sizes (here 25 MB each) are given as a list.
    """
    parallel = DistributedDataParallel(policy, gradient_as_bucket_view=True, bucket_cap_mb_list=[25])
    # DDP puts gradients into its buckets in the first pass that averages. With --accumulation others come before it,
    # and would fill a second copy. So a pass without the model's work comes first, and a second one, before which the
    # buckets are rebuilt.
    trained = [p for p in policy.parameters() if p.requires_grad]
    policy.forward = lambda: sum(p.flatten()[0] for p in trained)
    parallel().backward()
    parallel().backward()
    del policy.forward  # the class's own is back
    for p in trained:
        p.grad.zero_()
    return parallel


def frozen_reference(reference, keep_tower):
    """Freeze the reference policy of the KL; several ranks hold a share of its weights each.

    A rank gathers a layer's weights when the layer runs, and lets them go. So every rank must run the reference equally
    often. The prompts of an iteration are as many on each (`data.TaskSampler`), so it does. The tower is not needed
    where the policy's is frozen, for both then read the same features.
    """
    from torch.distributed.device_mesh import init_device_mesh  # not above: a mistyped option should not wait for them
    from torch.distributed.fsdp import fully_shard

    reference.requires_grad_(False).eval()
    model = reference.model
    if not keep_tower:
        del model.model.visual
    if dist.get_world_size() > 1:
        parts = list(model.model.language_model.layers)
        embeddings = model.get_input_embeddings()
        if model.lm_head.weight is not embeddings.weight:
            parts.append(embeddings)
        # The head belongs to the whole: it runs in chunks, more of them on a rank with longer completions.
        mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
        for part in (*parts, reference):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    reference.forward = torch.no_grad()(reference.forward)
    return reference
