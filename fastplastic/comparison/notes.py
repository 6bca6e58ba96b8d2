"""Why the figures of profiles may differ though the weights do not: a sentence for each reason."""

from collections.abc import Mapping, Sequence

from fastplastic.files import ProfileFigures

# What each changes in the counts.
_REASONS: Mapping[str, str] = {
    "model": "layers are matched by their names",
    "data": "which units are dead, dormant or saturated depends on the data",
    "samples": "with more samples fewer units are dead or frozen",
    "mode": "norms and dropout work in another way in train mode, and other units count as dead",
    "dtype": "rounding changes which units seem to be constant",
    "seed": "what was drawn at random, such as weights, noise or dropout, is not the same",
}
_TITLES = {"samples": "number of samples"}


def notes_on(profiles: Sequence[ProfileFigures], labels: Sequence[str]) -> tuple[str, ...]:
    """Return what makes the figures of these profiles differ beside the weights."""
    notes = [
        f"the {_TITLES.get(key, key)} differs ({_each(labels, values)}): {reason}"
        for key, reason in _REASONS.items()
        if len(set(values := [getattr(profile, key) for profile in profiles]) - {None}) > 1
    ]
    unnamed = [label for label, own in zip(labels, profiles, strict=True) if own.data is None]
    if unnamed:
        text = "does not name its data" if len(unnamed) == 1 else "do not name their data"
        notes.append(f"{listed(unnamed)} {text}: whether they are the same cannot be told")
    return (*notes, *_batches(profiles), *_heads(profiles, labels), *_widths(profiles))


def listed(names: Sequence[str]) -> str:
    """Return names as a list in words: A, B and C."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _batches(profiles: Sequence[ProfileFigures]) -> list[str]:
    """Say that data of one name are not the same numbers."""
    differ = [len({getattr(own, key) for own in profiles}) > 1 for key in ("data", "samples")]
    digests = {own.data_sha256 for own in profiles} - {None}
    if any(differ) or len(digests) < 2:
        return []
    return [
        "the batches differ, though the name of the data does not: other images, or another size, "
        "order or batch size: which units are dead, dormant or saturated depends on them"
    ]


def _heads(profiles: Sequence[ProfileFigures], labels: Sequence[str]) -> list[str]:
    """Say whose gradients are those of a head that is not the model's."""
    lent = [label for label, own in zip(labels, profiles, strict=True) if own.lent_head]
    if not lent:
        return []
    return [
        f"a fresh head was lent for the loss in {listed(lent)}: its gradients say little, and "
        "mean|g| is not to be compared"
    ]


def _each(labels: Sequence[str], values: Sequence[object]) -> str:
    pairs = zip(labels, values, strict=True)
    return ", ".join(
        f"{'unknown' if value is None else value} in {label}" for label, value in pairs
    )


def _widths(profiles: Sequence[ProfileFigures]) -> list[str]:
    """Say how many of the layers that all profiles have differ in their number of units."""
    first = profiles[0]
    common = [name for name in first.by_name if all(name in own.by_name for own in profiles)]
    sizes = [{own.by_name[name].units for own in profiles} for name in common]
    number = sum(len(units) > 1 for units in sizes)
    if not number:
        return []
    verb = "differs" if number == 1 else "differ"
    return [
        f"{number} of {len(sizes)} layers {verb} in the number of units: compare the shares there, "
        "not the counts"
    ]
