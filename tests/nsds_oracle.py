"""NSDS and its baselines the slow way, to check the fast way against.

Written from the formulas of arXiv 2603.17354 with numpy alone: every product is formed, every matrix gets a full
float64 singular value decomposition, nothing is shared between heads. A layer is a dict of arrays by role
(``attn_q`` ... ``ffn_down``), each (out_features, in_features).
"""

from __future__ import annotations

import numpy as np

SE_READINGS = {
    "ratio": lambda magnitude, entropy: magnitude / np.exp(entropy),
    "product": lambda magnitude, entropy: magnitude * np.exp(entropy),
}


def kurtosis(values):
    centred = values - values.mean()
    return (centred**4).mean() / (centred**2).mean() ** 2 - 3


def count_holding_99_percent(sigma, at_least):
    share = np.cumsum(sigma**2) / (sigma**2).sum()
    count = 1
    while share[count - 1] < 0.99:
        count += 1
    return max(count, at_least)


def projection_basis(unembedding):
    _, sigma, vt = np.linalg.svd(unembedding.astype(np.float64))
    return vt[: count_holding_99_percent(sigma, 1)].T


def detector_beta(u, v):
    return np.log(1 + max(kurtosis(v), 0))


def qk_beta(u, v):
    return np.log(1 + max(kurtosis(u), 0) * max(kurtosis(v), 0))


def writer_beta(basis):
    return lambda u, v: np.sqrt(sum((basis[:, j] @ u) ** 2 for j in range(basis.shape[1])))


def nv_and_se(matrix, beta, reading):
    u, sigma, vt = np.linalg.svd(matrix)
    k = count_holding_99_percent(sigma, 2)
    s = np.array([sigma[i] * beta(u[:, i], vt[i]) for i in range(k)])
    magnitude = s.sum()
    p = [x / magnitude for x in s if x > 0]
    return kurtosis(matrix), SE_READINGS[reading](magnitude, -sum(x * np.log(x) for x in p))


def layer_values(layer, basis, n_heads, n_kv_heads, head_dim, reading):
    w = {role: array.astype(np.float64) for role, array in layer.items()}
    qk, ov = [], []
    for h in range(n_heads):
        g = h // (n_heads // n_kv_heads)
        own, shared = slice(h * head_dim, (h + 1) * head_dim), slice(g * head_dim, (g + 1) * head_dim)
        qk.append(nv_and_se(w["attn_q"][own].T @ w["attn_k"][shared], qk_beta, reading))
        ov.append(nv_and_se(w["attn_output"][:, own] @ w["attn_v"][shared], writer_beta(basis), reading))
    values = {"qk": np.mean(qk, axis=0), "ov": np.mean(ov, axis=0)}
    if "ffn_gate" in w:
        values["gate"] = nv_and_se(w["ffn_gate"], detector_beta, reading)
    values["up"] = nv_and_se(w["ffn_up"], detector_beta, reading)
    values["down"] = nv_and_se(w["ffn_down"], writer_beta(basis), reading)
    return values


def probabilities(values):
    median = np.median(values)
    mad = np.median(np.abs(values - median))
    return 1 / (1 + np.exp(-(values - median) / (1.4826 * mad)))


def soft_or(p):
    return 1 - np.exp(np.log(1 - np.asarray(p)).mean(axis=0))


def nsds(layers, unembedding, n_heads, n_kv_heads, head_dim, reading):
    """Return per layer a dict: ``nv`` and ``se`` by component, ``p_nv``, ``p_se`` and ``score``."""
    basis = projection_basis(unembedding)
    values = [layer_values(layer, basis, n_heads, n_kv_heads, head_dim, reading) for layer in layers]
    names = list(values[0])
    p_nv, p_se = (soft_or([probabilities(np.array([v[name][i] for v in values])) for name in names]) for i in (0, 1))
    return [
        {
            "nv": {name: v[name][0] for name in names},
            "se": {name: v[name][1] for name in names},
            "p_nv": p_nv[i],
            "p_se": p_se[i],
            "score": soft_or([p_nv[i], p_se[i]]),
        }
        for i, v in enumerate(values)
    ]


def zd(layers):
    def fraction(w):
        return np.mean(np.abs((w - w.mean()) / w.std(ddof=1)) > 1)

    return [np.mean([fraction(w.astype(np.float64)) for w in layer.values()]) for layer in layers]


def mse(layers):
    def error(w):
        scale = np.abs(w).max() / 2
        return ((w - np.clip(np.round(w / scale), -1, 1) * scale) ** 2).sum()

    return [np.mean([error(w.astype(np.float64)) for w in layer.values()]) for layer in layers]


def ewq(layers):
    def entropy(w):
        p = np.exp(w.ravel()) / np.exp(w).sum()
        return -(p * np.log(p)).sum()

    return [
        sum(entropy(w.astype(np.float64)) / w.size for w in layer.values()) / sum(w.size for w in layer.values())
        for layer in layers
    ]


def kurtboost(layers):
    values = np.array([np.mean([kurtosis(w.astype(np.float64)) for w in layer.values()]) for layer in layers])
    jumps = values[1:] - values[:-1]
    boosted = values.copy()
    for i, jump in enumerate(jumps):
        if abs(jump - jumps.mean()) > 2 * np.sqrt(((jumps - jumps.mean()) ** 2).mean()):
            boosted[i + 1] *= 2
    return list(boosted)


BASELINES = {"zd": zd, "mse": mse, "ewq": ewq, "kurtboost": kurtboost}
