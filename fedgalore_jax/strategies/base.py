"""The protocol of a federated algorithm: a NamedTuple of pure functions.

The engine owns every loop, `vmap`, loss and key; a strategy says what travels and what is done with it.
Nothing here knows a model or a data set.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax import tree
from fedgalore_jax.optimizer import Schedule, adamw_tail, scale_by_warm_adam
from fedgalore_jax.types import Array, Flat, LoRA, Params, Tree

ROLES = ("adapt", "train", "freeze")
"""What a method does with a parameter: `adapt` kernels are trained in whatever form the method has for
them (in full, by LoRA, in a gradient subspace), `train` leaves are trained and averaged plainly by every
method, `freeze` leaves never move."""

DEFAULT_ROLES = (
    ("layers/.*kernel", "adapt"),
    ("(classifier|score|head)/", "train"),
    (".*", "freeze"),
)
"""Attention and MLP kernels are adapted, the head is trained, the rest (embeddings, norms, biases) stays."""


class Download(NamedTuple):
    """What every client of the round knows; never batched over clients.

    Attributes:
      trainable: `{path: leaf}`, where local training starts.
      frozen: `{path: leaf}`, the parameters that clients share and do not change.
      extra: whatever else the method sends (bases, synchronised moments).
      round: int32 scalar.
    """

    trainable: Flat
    frozen: Flat
    extra: Any
    round: Array


class ServerState(NamedTuple):
    """The server's memory, as most methods need it.

    Attributes:
      trainable, frozen: `{path: leaf}`, together the model in the method's own form.
      extra: whatever else the method keeps (moments, control variates, last changes).
      round: int32 scalar.
    """

    trainable: Flat
    frozen: Flat
    extra: Any
    round: Array


class Local(NamedTuple):
    """A client in the middle of its local steps.

    Attributes:
      trainable: like `Download.trainable`.
      opt: state of the strategy's `tx`.
      extra: what the steps need besides (an own basis); constant during the round.
      first: loss and gradient (like `trainable`) of the first step, where `start` evaluated them; else None.
    """

    trainable: Flat
    opt: Tree
    extra: Any
    first: tuple[Array, Flat] | None = None


class Upload(NamedTuple):
    """What a client sends, in three lanes that the engine reduces differently.

    Attributes:
      mean: reduced to its p_i-weighted mean as chunks of clients finish: there are never C copies, and the
        lane works under secure aggregation.
      sum: summed without weights over participants. What is to be a mean over all N clients, such as one of
        their memories, each client multiplies with `Ops.share` beforehand.
      stack: kept as one row `[C, ...]` per client, for what must be seen jointly. A strategy that needs it
        does not work under secure aggregation.
    """

    mean: Tree = ()
    sum: Tree = ()
    stack: Tree = ()


class Cohort(NamedTuple):
    """Who took part in a round.

    Attributes:
      weights: `[C]`, p_i proportional to sample counts; they sum to 1 over participants, 0 elsewhere.
      mask: `[C]`, 1.0 for a client that took part.
      num_clients: N, a Python int.
      steps: K, a Python int; with stragglers the weighted mean of the steps they did, rounded, int32.
    """

    weights: Array
    mask: Array
    num_clients: int
    steps: int | Array


class Ops(NamedTuple):
    """A client's hand tools; most strategies ignore them.

    Attributes:
      id: int32 scalar, which client this is.
      share: float scalar, its samples as a share of all N clients': what it weighs in a mean over everyone.
        With a robust aggregator 1 / N.
      key: PRNG key of this client in this round.
      value_and_grad: `value_and_grad(assemble, tree, j)` is the loss of the model `assemble(tree)` on the
        client's j-th batch, and its gradient with respect to `tree`.
      train: `train(local, tx)` is `local` after K steps of `tx` on the client's batches, the same ones (and
        the same dropout) as in its local training.
      steps: K, a Python int.
    """

    id: Array
    share: Array
    key: Array
    value_and_grad: Callable[[Callable[[Tree], Params], Tree, int], tuple[Array, Tree]]
    train: Callable[..., Local]
    steps: int


class Strategy(NamedTuple):
    """A federated algorithm.

    Attributes:
      init: `(params, key, num_clients) -> state`, once. The state has a field `round`.
      broadcast: `(state) -> Download`, once a round.
      assemble: `(download, trainable, extra) -> params`, what the model sees: a kernel is an array or an
        `Adapted`. `extra` is `Local.extra`.
      start: `(download, client_state, ops) -> Local`, on each client (vmapped).
      finish: `(download, local, client_state, ops) -> (Upload, client_state)`, on each client (vmapped).
      aggregate: `(state, upload, cohort) -> (state, metrics)`; `upload.stack` has a leading client axis.
      export: `(state, client_state=None) -> params`, the dense global model; of a personalised method with
        a client's memory, that client's own model.
      tx: the local step, called as `tx.update(g, opt, trainable, extra=local.extra, start=, step=,
        grad_fn=)`: where local training started, the global step, and `grad_fn(trainable) -> grads`, a
        further gradient on the same batch with the same dropout.
      client_init: `(params, id) -> client_state`, the memory of one client; `()` costs nothing.
      wire_down: `(download) -> tree` that really travels down (a seed, not the basis made from it).
      wire_up: `(upload) -> tree` that really travels up; called with one client's upload.
      relay: `(stack) -> tree`, what of all clients' rows `[C, ...]` the server sends on to every client.
      catch_up: `(download) -> tree`, what of this round's download a client that stays away must be sent
        later; what is relayed counts as well.
      catch_up_once: whether that makes up for any number of missed rounds, as where values are sent; changes
        are sent for each.
      wire_of: over how many rounds (or clients) the trees of `wire_down`, `wire_up` and `catch_up` extend,
        for methods whose rounds or clients differ; bytes are their mean.
      adapter: `(state) -> (factors, lora_alpha)`, for methods whose kernels never move: the model is
        `kernel + lora_alpha / r * a @ b` of the original kernels, next to its plainly trained leaves.
      personal: whether every client has a model of its own, to be evaluated on its own data.
      comparable: whether an entry of an upload means the same for every client, so that a median over clients
        means something too: not where bases, ranks or layers are a client's own.
    """

    init: Callable[[Params, Array, int], Any]
    broadcast: Callable[[Any], Download]
    assemble: Callable[[Download, Flat, Any], Params]
    start: Callable[[Download, Any, Ops], Local]
    finish: Callable[[Download, Local, Any, Ops], tuple[Upload, Any]]
    aggregate: Callable[[Any, Upload, Cohort], tuple[Any, dict[str, Array]]]
    export: Callable[..., Params]
    tx: optax.GradientTransformationExtraArgs
    client_init: Callable[[Params, Array], Any] = lambda params, id: ()
    wire_down: Callable[[Download], Tree] = lambda download: download.trainable
    wire_up: Callable[[Upload], Tree] = lambda upload: upload
    relay: Callable[[Tree], Tree] = lambda stack: ()
    catch_up: Callable[[Download], Tree] = lambda download: ()
    catch_up_once: bool = False
    wire_of: int = 1
    adapter: Callable[[Any], tuple[dict[str, LoRA], float]] | None = None
    personal: bool = False
    comparable: bool = True


OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Common:
    """Options that mean the same for every strategy.

    Attributes:
      lr: learning rate of the clients, or a schedule of the global step (round * K + local step).
      rank: r of adapters and subspaces; a subspace must be smaller than the side that it lies in.
      ranks: of the clients, cycled over their ids, where a method allows them to differ; `rank` is then the
        largest. None gives every client `rank`.
      head_ratio: learning rate of `train` leaves as a multiple of `lr`; may be traced.
      lora_alpha: LoRA's alpha; the scale is `lora_alpha / rank`; where ranks differ, of a client's own in
        flora and flexlora, of the largest in hetlora and ilora. None means a scale of 2.
      weight_decay: decoupled, on kernels only.
      clip: global norm above which a client's gradient, as trained (projected where projected), is scaled
        down; 0 switches it off.
      b1, b2, eps: Adam's.
      roles: ordered `(path regex, role)`, see `ROLES`.
    """

    lr: float | Schedule
    rank: int = 4
    ranks: tuple[int, ...] | None = None
    head_ratio: float | Array = 1.0
    lora_alpha: float | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    roles: tuple[tuple[str, str], ...] = DEFAULT_ROLES

    def __post_init__(self):
        """Refuses values that cannot mean anything."""
        if not callable(self.lr):
            require("lr", self.lr, 0 < self.lr < math.inf, "a positive, finite number")
        require("rank", self.rank, isinstance(self.rank, int) and self.rank > 0, "an integer >= 1")
        if self.ranks is not None:
            whole = bool(self.ranks) and all(isinstance(r, int) and r > 0 for r in self.ranks)
            require("ranks", self.ranks, whole, "integers >= 1")
            require("ranks", self.ranks, max(self.ranks) == self.rank, f"a largest rank of {self.rank}")
        if not isinstance(self.head_ratio, Array):
            require("head_ratio", self.head_ratio, 0 <= self.head_ratio < math.inf, "a finite number >= 0")
        for name in ("weight_decay", "clip", "b1", "b2"):
            value = getattr(self, name)
            require(name, value, 0 <= value < math.inf, "a finite number >= 0")
        require("b1", self.b1, self.b1 < 1, "a number in [0, 1)")
        require("b2", self.b2, self.b2 < 1, "a number in [0, 1)")
        require("eps", self.eps, 0 < self.eps < math.inf, "a positive, finite number")
        if self.lora_alpha is not None:
            require("lora_alpha", self.lora_alpha, 0 < self.lora_alpha < math.inf, "positive")
        for pattern, role in self.roles:
            require("roles", f"{pattern}={role}", role in ROLES, f"a role among {', '.join(ROLES)}")

    @property
    def lora_scale(self) -> float:
        """s = alpha / r."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / self.rank

    def rank_of(self, client: Array) -> Array:
        """The rank of a client, int32 scalar."""
        ranks = jnp.asarray(self.ranks or (self.rank,), jnp.int32)
        return ranks[client % len(ranks)]

    def role(self, path: str) -> str:
        """The role of one parameter."""
        return next(role for pattern, role in self.roles if re.match(pattern, path))

    def split(self, flat: Flat) -> tuple[Flat, Flat, Flat]:
        """Sorts a model's leaves `{path: leaf}` by role: `(adapt, train, freeze)`."""
        role = tree.resolve(flat, self.roles)
        adapt, train, freeze = (
            {path: leaf for path, leaf in flat.items() if role[path] == wanted} for wanted in ROLES
        )
        if others := [path for path in adapt if path.rsplit("/")[-1] != "kernel"]:
            raise ValueError(f"only kernels can be adapted, not {', '.join(others)}: train them")
        return adapt, train, freeze

    def adapted(self, flat: Flat) -> Flat:
        """The `adapt` leaves of a model or of a part of it."""
        return {path: leaf for path, leaf in flat.items() if self.role(path) == "adapt"}

    def trained(self, params: Params) -> Flat:
        """The leaves `{path: leaf}` that full-weight methods train."""
        adapt, train, _ = self.split(tree.flatten(params))
        return adapt | train

    def clipped_adam(self) -> optax.GradientTransformation:
        """Clipping by the norm of what is trained, then Adam."""
        return optax.chain(self.clipping(), scale_by_warm_adam(self.b1, self.b2, self.eps))

    def clipping(self) -> optax.GradientTransformation:
        """Clipping by the norm of what is trained."""
        return optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()

    def tail(self) -> optax.GradientTransformationExtraArgs:
        """Decoupled decay and the step size; `train` leaves at their own learning rate."""
        ratio = [("shrink$", 1.0)]  # decays with the kernels, whatever the user's patterns match
        ratio += [(p, self.head_ratio if role == "train" else 1.0) for p, role in self.roles]
        return adamw_tail(self.lr, self.weight_decay, ratio)

    def adamw(self) -> optax.GradientTransformationExtraArgs:
        """The clients' optimizer over `{path: leaf}`."""
        return self.optimizer("adamw")

    def optimizer(
        self, client: str, *corrections: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """The clients' optimizer: corrections of the gradient, clipping, Adam (or not), decay, step size."""
        require("client", client, client in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        inner = self.clipped_adam() if client == "adamw" else self.clipping()
        return optax.chain(*corrections, inner, self.tail())


def require(name: str, value, ok: bool, remedy: str) -> None:
    """Raises for an option that cannot be used, in one line."""
    if not ok:
        raise ValueError(f"{name}={value!r} is not usable: give {remedy}")


def change(download: Download, local: Local) -> Flat:
    """What local training changed, `{path: trained - start}`.

    Methods average changes rather than values: a round in which nobody took part then moves nothing.
    """
    return jax.tree.map(jnp.subtract, local.trainable, download.trainable)


def scaled(tree: Tree, share: Array) -> Tree:
    """`share * tree`, in the tree's dtypes."""
    return jax.tree.map(lambda x: share.astype(x.dtype) * x, tree)


def add(start: Tree, update: Tree) -> Tree:
    """`start + update`, in `start`'s dtypes."""
    return jax.tree.map(lambda s, u: (s + u).astype(s.dtype), start, update)
