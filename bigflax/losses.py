"""Losses: arrays in, one float32 value per example or token out. Means, weights and masks belong to the task that knows what it averages.

Where optax has the very thing, this is its name here; the others are formulas with their paper. Logits are [..., V] and may be bfloat16:
everything is computed in float32. Label -100 is ignored: its value and its gradient are 0.

Left out on purpose: the loss of a vocabulary head that never holds its logits (`ops.linear_cross_entropy`), and losses that need a model
or a batch's meaning (`tasks`, `compress`).
"""

import jax
import jax.numpy as jnp
import optax

IGNORE = -100
DIVERGENCES = ("forward", "reverse", "js", "skewed", "skewed_reverse")
PREFERENCES = ("sigmoid", "ipo", "hinge")
NEVER = -1e30  # the logit of what is no candidate: its probability is 0, and unlike that of -inf its gradient is too


def token_log_probs(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """log p(label), of labels' shape; 0 where the label is -100."""
    logits = logits.astype(jnp.float32)
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == labels[..., None]
    picked = jnp.where(hit, logits, 0).sum(-1) - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(labels == IGNORE, 0, picked)


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    gamma: float = 0.0,
    weights: jax.Array | None = None,
) -> jax.Array:
    """-sum_v t_v w_v (1 - p_v)^gamma log p_v, t = (1 - smoothing) onehot(label) + smoothing / V, plus z_loss * logsumexp(logits)^2; of labels' shape.

    Labels of the logits' own shape are soft: t = (1 - smoothing) labels + smoothing / V, rows that sum to 1, or -100 throughout; [..., V] -> [...].
    Smoothing: Szegedy et al. 2016 (arXiv 1512.00567). z-loss: PaLM (2204.02311), at 1e-4. gamma: the focal loss of many classes, Lin et al. 2017
    (1708.02002). `weights` [V] are the classes'; who averages divides by rows, or, as PyTorch does, by the sum of the weights of their labels.
    """
    logits = logits.astype(jnp.float32)
    lse, soft = jax.nn.logsumexp(logits, axis=-1), labels.ndim == logits.ndim
    ignored = (labels[..., 0] if soft else labels) == IGNORE
    if gamma or weights is not None:
        log_p, V = logits - lse[..., None], logits.shape[-1]
        target = (1 - smoothing) * (labels if soft else jax.nn.one_hot(labels, V)) + smoothing / V
        unsure = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(jnp.float32).tiny) ** gamma  # 0 would have no slope for a gamma below 1
        loss = -(target * (1 if weights is None else weights) * unsure * log_p).sum(-1)
    else:
        log_p = (labels * (logits - lse[..., None])).sum(-1) if soft else token_log_probs(logits, labels)
        loss = -(1 - smoothing) * log_p
        if smoothing:
            loss += smoothing * (lse - logits.mean(-1))
    if z_loss:
        loss += z_loss * jnp.square(lse)
    return jnp.where(ignored, 0, loss)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-y log sigmoid(l) - (1 - y) log sigmoid(-l), elementwise; labels in [0, 1]."""
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), labels)


def focal(logits: jax.Array, labels: jax.Array, *, gamma: float = 2.0, alpha: float | None = None) -> jax.Array:
    """Binary cross-entropy times (1 - p_true)^gamma, elementwise; alpha weighs the positives. Lin et al. 2017 (arXiv 1708.02002)."""
    return optax.sigmoid_focal_loss(logits.astype(jnp.float32), labels, alpha=alpha, gamma=gamma)


def mse(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """(p - t)^2, elementwise."""
    return optax.squared_error(predictions.astype(jnp.float32), targets.astype(jnp.float32))


def huber(predictions: jax.Array, targets: jax.Array, *, delta: float = 1.0) -> jax.Array:
    """Half the square up to delta, linear beyond, elementwise. Huber 1964."""
    return optax.huber_loss(predictions.astype(jnp.float32), targets.astype(jnp.float32), delta=delta)


def kl_divergence(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 1.0, kind: str = "forward", skew: float = 0.1,
    beta: float = 0.5,
) -> jax.Array:  # fmt: skip
    """temperature^2 times a divergence of p (teacher) and q (student), both softened by the temperature; [..., V] -> [...].

    forward         KL(p | q)                              Hinton et al. 2015 (arXiv 1503.02531): its temperature^2 keeps the gradient's size
    reverse         KL(q | p)                              Gu et al. 2023 (MiniLLM, 2306.08543)
    js              beta KL(p | m) + (1 - beta) KL(q | m), m = beta p + (1 - beta) q; Agarwal et al. 2023 (GKD, 2306.13649), equation 1
    skewed          KL(p | skew p + (1 - skew) q)          Ko et al. 2024 (DistiLLM, 2402.03898)
    skewed_reverse  KL(q | skew q + (1 - skew) p)          the same

    Never negative, 0 where the two agree. The teacher gets a gradient too: `jax.lax.stop_gradient` is the caller's.
    """
    log_q, log_p = (jax.nn.log_softmax(logits.astype(jnp.float32) / temperature) for logits in (student_logits, teacher_logits))
    return temperature**2 * _divergence(log_p, log_q, kind, skew, beta)


def top_k_divergence(
    student_logits: jax.Array, values: jax.Array, ids: jax.Array, *, temperature: float = 1.0, kind: str = "forward", skew: float = 0.1,
    beta: float = 0.5,
) -> jax.Array:  # fmt: skip
    """`kl_divergence` from a teacher of whom `top_k` is left, its temperature this one: [..., V], [..., k + 1], [..., k] -> [...].

    All classes but the teacher's k likeliest are one, the tail, whose probabilities are p_tail = 1 - sum_k p and q_tail = 1 - sum_k q:

        sum_k d(p_k, q_k) + d(p_tail, q_tail),      d = p log(p / q) for "forward"

    which is 0 where the k agree, never more than the divergence of all classes (joining classes loses information), and equal to it for k = V.
    Without the tail, as after renormalizing the k, nothing would keep the student from giving probability to what the teacher rules out.
    """
    log_q = jax.nn.log_softmax(_joined(student_logits.astype(jnp.float32) / temperature, ids))
    log_p = jax.nn.log_softmax(values.astype(jnp.float32))  # narrow numbers add up to one again
    return temperature**2 * _divergence(log_p, log_q, kind, skew, beta)


def top_k(logits: jax.Array, k: int, *, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """(values [..., k + 1], ids [..., k]): log p of the k likeliest classes, likeliest first, and last that of all the others together; float32."""
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"of {logits.shape[-1]} classes the {k} likeliest cannot be kept; give from 1 to {logits.shape[-1]}")
    soft = logits.astype(jnp.float32) / temperature
    ids = jax.lax.top_k(soft, k)[1]
    return jnp.maximum(jax.nn.log_softmax(_joined(soft, ids)), -1e4), ids  # -1e4: what float16 can keep


def _joined(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The logits of `ids`, and last the logit of all other classes as one: [..., V], [..., k] -> [..., k + 1]."""
    without = lambda row, at: row.at[at].set(NEVER)
    for _ in range(logits.ndim - 1):  # row by row: whoever shards rows keeps them where they are
        without = jax.vmap(without)
    rest = jax.nn.logsumexp(without(logits, ids), axis=-1, keepdims=True)
    return jnp.concatenate([jnp.take_along_axis(logits, ids, axis=-1), rest], axis=-1)


def relation_divergence(
    student: jax.Array, teacher: jax.Array, *, heads: int, real: jax.Array | None = None, kind: str = "forward"
) -> jax.Array:
    """How differently two sequences of vectors relate to themselves: [B, T, D], [B, T, D'] -> [B, T], the mean over relation heads.

    Each is cut into `heads` parts of its width, whose relations softmax(x x^T / sqrt(D / heads)) are compared, row by row: Wang et al. 2020
    (MiniLMv2, arXiv 2012.15828), equations 4 and 5, of whatever vectors these are. D and D' may differ. Who is not `real` [B, T] is no candidate.
    """
    scores = []
    for x in (student, teacher):
        if x.shape[-1] % heads:
            raise ValueError(f"a width of {x.shape[-1]} does not divide into {heads} relation heads")
        x = x.reshape(*x.shape[:2], heads, -1)
        near = jnp.einsum("btrw,bsrw->brts", x, x, preferred_element_type=jnp.float32) / jnp.sqrt(x.shape[-1])
        scores.append(near if real is None else jnp.where(real[:, None, None, :], near, NEVER))
    return kl_divergence(*scores, kind=kind).mean(1)


def affinity_divergence(student: jax.Array, teacher: jax.Array, *, real: jax.Array | None = None, **options) -> jax.Array:
    """How differently two models find rows near columns: `kl_divergence` of the rows and of the columns of [B, B] logits, averaged: [B].

    Of pairs of images and texts Wu et al. 2023 (TinyCLIP, arXiv 2309.12314), equation 2. `real` [B, B] says which entries there are; `options` are
    those of `kl_divergence`.
    """
    mask = lambda x: x if real is None else jnp.where(real, x, NEVER)
    s, t = mask(student.astype(jnp.float32)), mask(teacher.astype(jnp.float32))
    return (kl_divergence(s, t, **options) + kl_divergence(s.T, t.T, **options)) / 2


def _divergence(log_p: jax.Array, log_q: jax.Array, kind: str, skew: float, beta: float) -> jax.Array:
    if kind not in DIVERGENCES:
        raise ValueError(f"kl_divergence has no kind {kind!r}; take one of {', '.join(DIVERGENCES)}")
    if kind == "forward":
        return _kl(log_p, log_q)
    if kind == "reverse":
        return _kl(log_q, log_p)
    if kind == "skewed":
        return _kl(log_p, _mix(log_p, log_q, skew))
    if kind == "skewed_reverse":
        return _kl(log_q, _mix(log_q, log_p, skew))
    log_m = _mix(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """sum p (log p - log q); where p is 0 so is the term, also for logits of -inf; what is no number stays none."""
    p = jnp.exp(log_p)
    return jnp.where(p == 0, 0, p * (jnp.where(p == 0, 0, log_p) - jnp.where(p == 0, 0, log_q))).sum(-1)


def _mix(log_p: jax.Array, log_q: jax.Array, share: float) -> jax.Array:
    """log(share p + (1 - share) q)."""
    return jnp.logaddexp(log_p + jnp.log(share), log_q + jnp.log1p(-share))


def contrastive(a: jax.Array, b: jax.Array, scale: jax.Array | float, *, real: jax.Array | None = None) -> jax.Array:
    """Cross-entropy of scale * a b^T against the diagonal, rows and columns averaged: [B, D], [B, D] -> [B].

    Symmetric InfoNCE: Radford et al. 2021 (CLIP, arXiv 2103.00020), where a and b have unit rows and scale is exp(logit_scale). A row that `real` [B]
    calls False is no candidate of the others and has loss 0.
    """
    logits = scale * jnp.matmul(a, b.T, preferred_element_type=jnp.float32)
    labels = jnp.arange(a.shape[0])
    if real is not None:
        logits, labels = jnp.where(real & real[:, None], logits, NEVER), jnp.where(real, labels, IGNORE)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def sigmoid_contrastive(
    a: jax.Array, b: jax.Array, scale: jax.Array | float, bias: jax.Array | float = 0.0, *, real: jax.Array | None = None
) -> jax.Array:
    """sum_j -log sigmoid(z_ij (scale a_i . b_j + bias)) with z = 1 on the diagonal and -1 elsewhere: [B, D], [B, D] -> [B].

    Zhai et al. 2023 (SigLIP, arXiv 2303.15343), equation 1 before the mean; there rows are unit, scale and bias start at 10 and -10.
    `real` is that of `contrastive`.
    """
    logits = scale * jnp.matmul(a, b.T, preferred_element_type=jnp.float32) + bias
    losses_BB = -jax.nn.log_sigmoid((2 * jnp.eye(a.shape[0]) - 1) * logits)
    return (losses_BB if real is None else jnp.where(real & real[:, None], losses_BB, 0)).sum(-1)


def dpo(
    chosen_logp: jax.Array,
    rejected_logp: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    beta: float = 0.1,
    *,
    kind: str = "sigmoid",
    smoothing: float = 0.0,
) -> jax.Array:
    """A loss of h = (chosen - ref_chosen) - (rejected - ref_rejected), of summed log probabilities of answers; [B] -> [B].

    sigmoid  -log sigmoid(beta h)       Rafailov et al. 2023 (arXiv 2305.18290), equation 7
    ipo      (h - 1 / (2 beta))^2       Azar et al. 2023 (2310.12036), equation 17
    hinge    max(0, 1 - beta h)         Zhao et al. 2023 (2305.10425), with a reference as Liu et al. 2023 (2309.06657)

    smoothing is the chance that a pair's order is wrong: so much of the loss is that of -h (Mitchell's cDPO).
    """
    if kind not in PREFERENCES:
        raise ValueError(f"dpo has no kind {kind!r}; take one of {', '.join(PREFERENCES)}")
    h = ((chosen_logp - ref_chosen) - (rejected_logp - ref_rejected)).astype(jnp.float32)
    each = {
        "sigmoid": lambda h: -jax.nn.log_sigmoid(beta * h),
        "ipo": lambda h: jnp.square(h - 1 / (2 * beta)),
        "hinge": lambda h: jax.nn.relu(1 - beta * h),
    }[kind]
    return (1 - smoothing) * each(h) + smoothing * each(-h) if smoothing else each(h)


def bradley_terry(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """-log sigmoid(chosen - rejected) of two scores: the loss of reward models. Bradley and Terry 1952; Ouyang et al. 2022 (2203.02155)."""
    return -jax.nn.log_sigmoid((chosen - rejected).astype(jnp.float32))
