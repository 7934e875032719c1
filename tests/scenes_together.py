"""Evaluates a segmenter and a detector on drawn scenes, by as many processes as there are.

    python tests/scenes_together.py BATCH_SIZE [HOST:PORT NUM_PROCESSES PROCESS_ID]

Prints what it finds as one line of JSON. Nothing here needs TensorFlow.
"""

import json
import sys

import jax
import numpy as np

from vit_jax.config import default_config, validate
from vit_jax.data import boxes
from vit_jax.data.builders import _scenes as scenes
from vit_jax.parallel import sharding
from vit_jax.training import evaluate
from vit_jax.training.run import Run

NUM_SCENES, SIDE = 21, 32
TASKS = {
    "segmentation": ("segmentation",),
    "detection": ("boxes", "box_label", "box_crowd", "box_area"),
}


class Source:
    """Scenes as the pipeline would give them, with the fields of one task."""

    def __init__(self, name: str, split: str):  # There is one split.
        self.class_names = scenes.CLASS_NAMES[1 if name == "detection" else 0 :]
        self.num_classes = len(self.class_names)
        self.fingerprint = f"scenes:{name}:{NUM_SCENES}"
        drawn = [scenes.draw_scene(3, i, split="test", side=SIDE) for i in range(NUM_SCENES)]
        objects = [
            boxes.Objects(scene.boxes, scene.digits, np.zeros(len(scene.digits)), scene.areas)
            for scene in drawn
        ]
        fields = boxes.pack(objects, scenes.MAX_DIGITS, str)
        fields["segmentation"] = np.stack([scene.segmentation for scene in drawn])
        self._records = {key: fields[key] for key in TASKS[name]}
        self._records["image"] = np.stack([scene.image for scene in drawn])

    def __len__(self) -> int:
        return NUM_SCENES

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {key: x[indices] for key, x in self._records.items()}

    def describe(self, index: int) -> str:
        return f"scene {index}"


def metrics(batch_size: int) -> dict[str, float]:
    """Returns the scores of models with random parameters: low, but every scene counts in them."""
    found = {}
    for name in TASKS:
        config = default_config()
        config.batch_size = batch_size
        config.total = 1
        config.model = {"name": "vit", "patch_size": 8, "width": 8, "depth": 1, "num_heads": 1}
        config.task = {"name": name}
        config.data.source, config.data.name = "scenes_together:Source", name
        config.eval.sets = {"scenes": {}}
        run = Run.build(validate(config))
        random = np.random.default_rng(0)

        def draw(leaf: jax.ShapeDtypeStruct, random=random) -> jax.Array:
            values = random.normal(0, 0.1, leaf.shape).astype(np.float32)
            return sharding.place_whole(values, leaf)

        params = jax.tree.map(draw, run.abstract.params)
        evaluator = evaluate.Evaluator(run.config, run.task, run.abstract, run.mesh)
        found |= {f"{name}/{key}": value for key, value in evaluator.run(params).items()}
    return found


if __name__ == "__main__":
    if len(sys.argv) > 2:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address, num_processes, process_id = sys.argv[2:]
        jax.distributed.initialize(address, int(num_processes), int(process_id))
    found = metrics(int(sys.argv[1]))
    if jax.process_index() == 0:
        print(json.dumps(found))
