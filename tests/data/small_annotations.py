"""The least annotations in the formats of COCO."""

COCO = {
    "images": [
        {"id": i, "file_name": f"{'ab'[i]}.png", "width": 6, "height": 4} for i in range(2)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
    "annotations": [
        {"id": i, "image_id": i % 2, "category_id": 1 + 2 * (i % 2), "bbox": [1, 1, 2.5, 2],
         "area": 5.0, "iscrowd": 0}
        for i in range(3)
    ],
}  # fmt: skip
CAPTIONS = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
    "annotations": [{"image_id": i, "caption": f"a cat, {i}"} for i in (1, 2, 1)],
}
