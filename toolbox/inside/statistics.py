"""Numbers about what a model computes inside. Tensors in, numbers out; nothing here knows a model."""
import torch


def auc(positive, negative):
    """Probability that a random one of `positive` (n,) is larger than a random one of `negative` (m,); ties count half.

    The area under the ROC curve; nan if one of them is empty.
    """
    if not len(positive) or not len(negative):
        return float("nan")
    negative = negative.sort().values.contiguous()
    below = torch.searchsorted(negative, positive.contiguous(), right=False)
    not_above = torch.searchsorted(negative, positive.contiguous(), right=True)
    return ((below + not_above).double().mean() / (2 * len(negative))).item()


def auc_within_places(values, is_positive, counts):
    """The AUC of values (N, P, P) for is_positive within each pair of places: mean over them, weighted by comparisons.

    counts: (N, P, P), False where there is nothing to compare. Pooled over places, a value that only tells a place
    could look as if it told more.
    """
    total = weight = 0
    for i, j in (is_positive & counts).any(0).nonzero().tolist():
        positive, negative = (values[:, i, j][counts[:, i, j] & (is_positive[:, i, j] == wanted)]
                              for wanted in (True, False))
        if len(negative):
            total += auc(positive, negative) * len(positive) * len(negative)
            weight += len(positive) * len(negative)
    return total / weight if weight else float("nan")


def top_one(scores, is_right):
    """How often the largest of scores (N, S) is right: mean over rows; k equal largest ones count 1/k each."""
    largest = scores == scores.max(-1, keepdim=True).values
    return ((largest & is_right).sum(-1) / largest.sum(-1)).double().mean().item()


# ---- symbols ---------------------------------------------------------------------------------------------------------

def entropy(p, dim=-1):
    """In nats, of distributions along `dim`."""
    return torch.special.entr(p).sum(dim)


def effective_number(p):
    """p (..., S), distributions over symbols: exp of their mean entropy, 1 if each is certain, S if each is uniform."""
    return entropy(p.double()).mean().exp().item()


def share_told(joint):
    """joint (..., classes, symbols), adds up to 1: the share of the classes' entropy that the symbol tells (...)."""
    classes, symbols = joint.sum(-1), joint.sum(-2)
    told = entropy(classes) + entropy(symbols) - entropy(joint.flatten(-2))
    return told / entropy(classes)


def joint_with(p, kinds, n_kinds):
    """p (N, S), how much of each symbol N tokens take, and their kinds (N,) -> joint distribution (n_kinds, S)."""
    return torch.zeros(n_kinds, p.size(1), dtype=torch.float64).index_add_(0, kinds, p.double()) / len(p)


def share_told_and_null(joint, classes, seed, shuffles=1000):
    """What a symbol tells of the class of its token, and what it would tell if classes were given to kinds at random.

    joint (kinds, S): of kinds of tokens and symbols; classes (kinds,): integers.
    -> the share of the classes' entropy, and the ends of the band in which 95% of `shuffles` random ones lie. Classes
    are shuffled over kinds of tokens, not over tokens: a symbol that tells the token tells any class of tokens, too.
    """
    classes, g = classes.unique(return_inverse=True)[1], torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.arange(len(classes)),
                          *(torch.randperm(len(classes), generator=g) for _ in range(shuffles))])
    members = torch.nn.functional.one_hot(classes[orders]).double()    # (1 + shuffles, kinds, classes)
    told = share_told(members.mT @ joint)
    low, high = told[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return told[0].item(), low, high


# ---- a linear probe --------------------------------------------------------------------------------------------------

def probe(features, labels, groups, *, folds=5, ridge=1e-3):
    """Share of the labels (N,) that a linear map of features (N, F) predicts, of samples that it was not fitted to.

    Ridge regression on one-hot labels in closed form; the largest output is the answer. Samples of one group (N,), as
    those of one image, are in the same of the `folds` parts: each part is predicted from the others.
    """
    labels = labels.unique(return_inverse=True)[1]
    targets, right = torch.nn.functional.one_hot(labels).double(), 0
    for fold in range(folds):
        test = groups % folds == fold
        X, Y = features[~test].double(), targets[~test]
        mean, std = X.mean(0), X.std(0).clamp(min=1e-12)
        X = (X - mean) / std
        W = torch.linalg.solve(X.mT @ X + ridge * len(X) * torch.eye(X.size(1), dtype=X.dtype), X.mT @ (Y - Y.mean(0)))
        right += ((((features[test] - mean) / std) @ W + Y.mean(0)).argmax(-1) == labels[test]).sum().item()
    return right / len(labels)
