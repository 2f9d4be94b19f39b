"""Slow, readable float64 references, written from the equations (arXiv 2510.09378, section 3, unless said otherwise).

Nothing here calls the code that it checks: Jacobians and Hessians are dense, losses are loops over predictions,
optimisers are loops over matrices. A model is only ever called forwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---------------------------------------------------------------- parameters as one vector


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries in one vector [P], in the mapping's order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `flatten`, with the names and shapes of `like`."""
    pieces = vector.split([tensor.numel() for tensor in like.values()])
    return {name: piece.reshape(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the Euclidean norm; shapes must agree."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Relative to the norm of what is expected; what is expected must not vanish, or there is nothing to compare."""
    assert expected.detach().norm() > 0, "the expected value is zero: nothing is tested"
    error = relative_error(found, expected)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def assert_all_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """By name; a tensor's error is relative to the norm of the whole, so that exact zeros may be expected."""
    assert list(found) == list(expected)
    whole = flatten(expected).detach().double().norm().item()
    assert whole > 0, "the expected values are zero: nothing is tested"
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        error = (found[name].detach().double() - expected[name].detach().double()).norm().item() / whole
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


# ---------------------------------------------------------------- Jacobian


def dense_jacobian(model: nn.Module, inputs: Tensor, names: Sequence[str]) -> Tensor:
    """J [outputs, parameters] = d outputs / d (the named parameters), row by row in reverse mode."""
    anchor = {name: p.detach() for name, p in model.named_parameters() if name in names}
    anchor = {name: anchor[name] for name in names}

    def outputs(vector: Tensor) -> Tensor:
        return torch.func.functional_call(model, unflatten(vector, anchor), (inputs,)).reshape(-1)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jacrev(outputs)(flatten(anchor)).detach()


# ---------------------------------------------------------------- losses in output space


class DenseLoss(Protocol):
    """L, g = dL/dz [outputs] and H = d2L/dz2 [outputs, outputs] of outputs z."""

    def value(self, z: Tensor, y: Tensor) -> Tensor: ...

    def gradient(self, z: Tensor, y: Tensor) -> Tensor: ...

    def hessian(self, z: Tensor, y: Tensor) -> Tensor: ...


class DenseCrossEntropy:
    """L = mean over n tokens of log sum exp z - z_y; g = (p - onehot(y)) / n; H = blocks (diag p - p p^T) / n."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        rows, classes = z.reshape(-1, z.shape[-1]), y.reshape(-1)
        total = torch.zeros((), dtype=z.dtype)
        for row, target in zip(rows, classes, strict=True):
            total = total + row.exp().sum().log() - row[target]
        return total / len(rows)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        rows, classes = z.reshape(-1, z.shape[-1]), y.reshape(-1)
        g = torch.zeros_like(rows)
        for i, (row, target) in enumerate(zip(rows, classes, strict=True)):
            g[i] = row.exp() / row.exp().sum()
            g[i, target] -= 1
        return g.reshape(-1) / len(rows)

    def hessian(self, z: Tensor, y: Tensor) -> Tensor:
        rows = z.reshape(-1, z.shape[-1])
        n, classes = rows.shape
        h = torch.zeros(n, classes, n, classes, dtype=z.dtype)
        for i, row in enumerate(rows):
            p = row.exp() / row.exp().sum()
            h[i, :, i, :] = (torch.diag(p) - torch.outer(p, p)) / n
        return h.reshape(n * classes, n * classes)


class DenseSquaredError:
    """L = mean over n predictions of 1/2 |z - y|^2; g = (z - y) / n; H = I / n."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros((), dtype=z.dtype)
        for prediction, target in zip(z, y, strict=True):
            total = total + 0.5 * ((prediction - target) ** 2).sum()
        return total / len(z)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.cat([(prediction - target).reshape(-1) for prediction, target in zip(z, y, strict=True)]) / len(z)

    def hessian(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.eye(z.numel(), dtype=z.dtype) / len(z)


# ---------------------------------------------------------------- subproblems


def ridge_penalty(delta: Mapping[str, Tensor], ridge: float) -> Tensor:
    """lambda * sum over tensors of mean(delta^2)."""
    total = torch.zeros((), dtype=torch.float64)
    for d in delta.values():
        total = total + ridge * (d**2).sum() / d.numel()
    return total


class Subproblem:
    """One block's subproblem around the anchor as dense algebra: z, g, H, J and G = J^T H J."""

    def __init__(
        self,
        model: nn.Module,
        dense_loss: DenseLoss,
        inputs: Tensor,
        targets: Tensor,
        names: Sequence[str],
        ridge: float,
    ) -> None:
        self.dense_loss, self.targets, self.ridge = dense_loss, targets, ridge
        parameters = dict(model.named_parameters())
        self.anchor = {name: parameters[name].detach().clone() for name in names}
        self.z = model(inputs).detach()
        self.jacobian = dense_jacobian(model, inputs, names)
        self.g = dense_loss.gradient(self.z, targets)
        self.h = dense_loss.hessian(self.z, targets)
        self.curvature = self.jacobian.T @ self.h @ self.jacobian
        scales = [torch.full((p.numel(),), 2 * ridge / p.numel(), dtype=p.dtype) for p in self.anchor.values()]
        self.ridge_diagonal = torch.cat(scales)

    def gauss_newton_value(self, delta: Tensor) -> Tensor:
        """L(z) + g.v + 1/2 v.Hv + ridge, v = J delta."""
        v = self.jacobian @ delta
        expansion = self.dense_loss.value(self.z, self.targets) + self.g @ v + 0.5 * v @ self.h @ v
        return expansion + ridge_penalty(unflatten(delta, self.anchor), self.ridge)

    def gauss_newton_gradient(self, delta: Tensor) -> Tensor:
        """J^T g + (J^T H J + diag 2 lambda / numel) delta."""
        return self.jacobian.T @ self.g + self.curvature @ delta + self.ridge_diagonal * delta

    def prox_linear_value(self, delta: Tensor) -> Tensor:
        """L(z + J delta, y) + ridge."""
        moved = self.z + (self.jacobian @ delta).reshape(self.z.shape)
        return self.dense_loss.value(moved, self.targets) + ridge_penalty(unflatten(delta, self.anchor), self.ridge)

    def prox_linear_gradient(self, delta: Tensor) -> Tensor:
        """J^T (dL/dz at z + J delta) + diag(2 lambda / numel) delta."""
        moved = self.z + (self.jacobian @ delta).reshape(self.z.shape)
        return self.jacobian.T @ self.dense_loss.gradient(moved, self.targets) + self.ridge_diagonal * delta

    def value(self, objective: str, delta: Tensor) -> Tensor:
        return {"gauss_newton": self.gauss_newton_value, "prox_linear": self.prox_linear_value}[objective](delta)

    def gradient(self, objective: str, delta: Tensor) -> Tensor:
        chosen = {"gauss_newton": self.gauss_newton_gradient, "prox_linear": self.prox_linear_gradient}[objective]
        return chosen(delta)

    def minimiser(self) -> Tensor:
        """delta of the Gauss-Newton subproblem: -(G + diag 2 lambda / numel)^-1 J^T g."""
        return -torch.linalg.solve(self.curvature + torch.diag(self.ridge_diagonal), self.jacobian.T @ self.g)


# ---------------------------------------------------------------- the decoder, position by position


def decoder_logits(weights: Mapping[str, Tensor], tokens: Tensor, blocks: int, heads: int) -> Tensor:
    """Logits [S, V] of one sequence tokens [S]: every position, head and score in a loop of its own."""

    def rms(x: Tensor, scale: Tensor) -> Tensor:
        return scale * x / (x.square().mean() + 1e-6).sqrt()

    def centred(x: Tensor, scale: Tensor) -> Tensor:
        return rms(x - x.mean(), scale)

    def rope(x: Tensor, position: int) -> Tensor:
        half = len(x) // 2
        turned = x.clone()
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / len(x))
            turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            turned[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return turned

    stream = [weights["embedding.weight"][token] for token in tokens]
    for index in range(blocks):
        w = {n.removeprefix(f"blocks.{index}."): t for n, t in weights.items() if n.startswith(f"blocks.{index}.")}
        normed = [rms(x, w["norm1.weight"]) for x in stream]
        queries = [centred(w["query.weight"] @ n, w["query_norm.weight"]) for n in normed]
        keys = [centred(w["key.weight"] @ n, w["key_norm.weight"]) for n in normed]
        values = [w["value.weight"] @ n for n in normed]
        size = len(stream[0]) // heads
        after = []
        for s, x in enumerate(stream):
            mixed = torch.zeros_like(x)
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                q = rope(queries[s][part], s)
                scores = torch.stack([q @ rope(keys[past][part], past) / math.sqrt(size) for past in range(s + 1)])
                weight = scores.exp() / scores.exp().sum()
                for past in range(s + 1):
                    mixed[part] += weight[past] * values[past][part]
            after.append(x + w["out.weight"] @ mixed)
        stream = []
        for m in after:
            hidden = w["up.weight"] @ rms(m, w["norm2.weight"])
            gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            stream.append(m + w["down.weight"] @ gelu)
    return torch.stack([weights["head.weight"] @ rms(x, weights["final_norm.weight"]) for x in stream])


# ---------------------------------------------------------------- optimisers

Gradients = Sequence[Tensor]


def clipped(gradients: Mapping[str, Tensor], limit: float | None) -> dict[str, Tensor]:
    """Scaled together to a Euclidean norm of at most `limit`, with torch's 1e-6 in the denominator."""
    norm = flatten(gradients).norm().item()
    scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
    return {name: g * scale for name, g in gradients.items()}


class AdamWReference:
    """arXiv 1711.05101, algorithm 2: decay, then a bias-corrected Adam step."""

    def __init__(self, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8) -> None:
        self.betas, self.weight_decay, self.eps, self.t = betas, weight_decay, eps, 0
        self.m: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}

    def step(self, theta: dict[str, Tensor], gradient: Mapping[str, Tensor], lr: float) -> dict[str, Tensor]:
        self.t += 1
        beta1, beta2 = self.betas
        moved = {}
        for name, g in gradient.items():
            self.m[name] = beta1 * self.m.get(name, torch.zeros_like(g)) + (1 - beta1) * g
            self.v[name] = beta2 * self.v.get(name, torch.zeros_like(g)) + (1 - beta2) * g**2
            m_hat, v_hat = self.m[name] / (1 - beta1**self.t), self.v[name] / (1 - beta2**self.t)
            decayed = (1 - lr * self.weight_decay) * theta[name]
            moved[name] = decayed - lr * m_hat / (v_hat.sqrt() + self.eps)
        return moved


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five steps X <- a X + b (X X^T) X + c (X X^T)^2 X from X = matrix / |matrix|_F (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm()
    for _ in range(5):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


def muon(theta: Tensor, gradients: Gradients, lrs: Sequence[float], momentum: float, weight_decay: float) -> Tensor:
    """B <- mu B + g; direction NS(g + mu B) sqrt(max(1, rows / columns)); decoupled decay (Jordan et al. 2024)."""
    buffer = torch.zeros_like(theta)
    for g, lr in zip(gradients, lrs, strict=True):
        buffer = momentum * buffer + g
        scale = math.sqrt(max(1.0, theta.shape[0] / theta.shape[1]))
        theta = (1 - lr * weight_decay) * theta - lr * scale * newton_schulz(g + momentum * buffer)
    return theta


def soap(
    theta: Tensor, gradients: Gradients, lr: float, betas: tuple[float, float], weight_decay: float, frequency: int
) -> Tensor:
    """arXiv 2409.11321, algorithms 3 and 4, for one matrix, with the conventions of pytorch_optimizer.SOAP.

    The first gradient only initialises L, R and their eigenvectors; weight decay comes after the step; L and R are
    updated after the step; the bases follow every `frequency` steps by one power iteration and a QR; the second
    moment is permuted with the order of the estimated eigenvalues. eps 1e-8 is outside the root.
    """
    beta1, beta2 = betas
    first, *rest = gradients
    left, right = (1 - beta2) * first @ first.T, (1 - beta2) * first.T @ first
    q_left, q_right = torch.linalg.eigh(left)[1].flip(1), torch.linalg.eigh(right)[1].flip(1)
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, g in enumerate(rest, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (q_left.T @ g @ q_right) ** 2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        # the implementation's eps is not bias-corrected: sqrt(v) + eps, then the factor sqrt(1 - beta2^t)
        denominator = v_hat.sqrt() + 1e-8 / math.sqrt(1 - beta2**t)
        rotated = (q_left.T @ m_hat @ q_right) / denominator
        theta = theta - lr * q_left @ rotated @ q_right.T
        theta = (1 - lr * weight_decay) * theta
        left = beta2 * left + (1 - beta2) * g @ g.T
        right = beta2 * right + (1 - beta2) * g.T @ g
        if t % frequency == 0:
            order_left = torch.diag(q_left.T @ left @ q_left).argsort(descending=True)
            order_right = torch.diag(q_right.T @ right @ q_right).argsort(descending=True)
            v = v[order_left][:, order_right]
            q_left = torch.linalg.qr(left @ q_left[:, order_left])[0]
            q_right = torch.linalg.qr(right @ q_right[:, order_right])[0]
    return theta


# ---------------------------------------------------------------- outer steps


def shampoo(theta: Tensor, gradients: Gradients, lrs: Sequence[float], weight_decay: float) -> Tensor:
    """theta <- (1 - lr wd) theta - lr L^(-1/4) G R^(-1/4), L and R sums of G G^T and G^T G (arXiv 1802.09568)."""

    def inverse_fourth_root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values**-0.25) @ vectors.T

    left, right = (1e-6 * torch.eye(size, dtype=theta.dtype) for size in theta.shape)
    for g, lr in zip(gradients, lrs, strict=True):
        left, right = left + g @ g.T, right + g.T @ g
        theta = (1 - lr * weight_decay) * theta - lr * inverse_fourth_root(left) @ g @ inverse_fourth_root(right)
    return theta


def schedule_free_adamw(
    theta: Tensor,
    gradient: Callable[[Tensor], Tensor],
    lrs: Sequence[float],
    betas: tuple[float, float],
    weight_decay: float,
) -> list[Tensor]:
    """The averages x_1, x_2, ... (arXiv 2405.15682, algorithm 1, averaging weights the largest lr so far, squared).

    y = (1 - beta_1) z + beta_1 x; z <- z - lr (g / sqrt(v_hat) + wd y) with g at y; x <- (1 - c) x + c z.
    """
    x, z, v, total, averages = theta, theta, torch.zeros_like(theta), 0.0, []
    for t, lr in enumerate(lrs, 1):
        y = (1 - betas[0]) * z + betas[0] * x
        g = gradient(y)
        v = betas[1] * v + (1 - betas[1]) * g**2
        z = z - lr * (g / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8) + weight_decay * y)
        weight = max(lrs[:t]) ** 2
        total += weight
        x = (1 - weight / total) * x + weight / total * z
        averages.append(x)
    return averages


def classifier_factors(
    weights: Mapping[str, Tensor], inputs: Tensor, labels: Tensor
) -> list[tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]]:
    """For W_0 and W_2 of x -> W_2 gelu(W_0 x + b_0) + b_2 under cross-entropy, example by example: the pairs (a, g) of
    input and output gradient, and their mean outer products A and S (arXiv 1503.05671)."""
    pairs: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = ([], [])
    for x, label in zip(inputs, labels, strict=True):
        before = weights["0.weight"] @ x + weights["0.bias"]
        normal_cdf = 0.5 * (1 + torch.erf(before / math.sqrt(2)))
        slope = normal_cdf + before * torch.exp(-(before**2) / 2) / math.sqrt(2 * math.pi)
        hidden = before * normal_cdf
        z = weights["2.weight"] @ hidden + weights["2.bias"]
        g = torch.exp(z - z.logsumexp(0))
        g[label] -= 1
        pairs[1].append((hidden, g))
        pairs[0].append((x, slope * (weights["2.weight"].T @ g)))
    n = len(inputs)
    return [(ps, sum(torch.outer(a, a) for a, _ in ps) / n, sum(torch.outer(g, g) for _, g in ps) / n) for ps in pairs]


def kronecker_direction(gradient: Tensor, S: Tensor, A: Tensor, damping: float) -> Tensor:
    """(S (x) A + damping mean(eigenvalues) I)^-1 vec(gradient), by a dense solve; gradient [out, in] in row order."""
    G = torch.kron(S, A)
    ridge = damping * G.trace() / len(G) * torch.eye(len(G), dtype=G.dtype)
    return torch.linalg.solve(G + ridge, gradient.flatten()).reshape(gradient.shape)


def whitening(matrix: Tensor) -> Tensor:
    """(X X^T)^(-1/2) X sqrt(n) for m <= n rows, by eigenvalues; of the transpose for m > n (arXiv 2412.13148)."""
    rows, columns = matrix.shape
    if rows > columns:
        return whitening(matrix.T).T
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return math.sqrt(columns) * (vectors / values.sqrt()) @ vectors.T @ matrix


def sinkgd(matrix: Tensor, sweeps: int) -> Tensor:
    """Rows to length sqrt(n), then columns to sqrt(m), `sweeps` times (arXiv 2502.06742, algorithm 3)."""
    x = matrix.clone()
    rows, columns = x.shape
    for _ in range(sweeps):
        for i in range(rows):
            x[i] *= math.sqrt(columns) / math.sqrt(sum(x[i, j].item() ** 2 for j in range(columns)))
        for j in range(columns):
            x[:, j] *= math.sqrt(rows) / math.sqrt(sum(x[i, j].item() ** 2 for i in range(rows)))
    return x


def inner_solution(
    start: dict[str, Tensor],
    gradient: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    optimizer: AdamWReference,
    lrs: Sequence[float],
) -> dict[str, Tensor]:
    """theta_hat after one AdamW step per learning rate along `gradient` from `start`."""
    theta = start
    for lr in lrs:
        theta = optimizer.step(theta, gradient(theta), lr)
    return theta
