"""The data card of a dataset: what a run is trained on, for the page of that run. Private."""

from __future__ import annotations

from lazydp.components.ingest.manifest import DatasetManifest
from lazydp.components.shared.page import Facts, page


def data_card(manifest: DatasetManifest) -> str:
    """The page.

    Args:
        manifest: of the dataset.
    """
    spec, counts = manifest.spec, manifest.counts
    bound = manifest.max_examples_per_user
    features = [
        (feature["name"], f"{feature['kind']}, of the {feature['source']}") for feature in spec.get("features") or []
    ]
    return page(
        f"Dataset {spec['name']}",
        audience="private",
        sections=[
            Facts(
                "Contents",
                [
                    ("family", manifest.family or "none declared"),
                    ("training examples", f"{counts.train:,}"),
                    ("held-out examples", f"{counts.test:,}"),
                    ("users", f"{counts.users:,}"),
                    ("items", f"{counts.items:,}"),
                    ("examples of one user", f"at most {bound:,}" if bound is not None else "no bound"),
                    ("rows read", f"{manifest.source.rows:,}"),
                    ("read from", ", ".join(manifest.source.locations)),
                ],
            ),
            Facts(
                "Rows left out",
                [(reason.replace("_", " "), f"{rows:,}") for reason, rows in sorted(manifest.rejected.items()) if rows],
            ),
            Facts("Features", features),
            Facts("Made by", [("lazydp", manifest.lazydp_version)]),
        ],
    )
