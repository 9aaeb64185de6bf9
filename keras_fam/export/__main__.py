"""`python -m keras_fam.export MODEL.keras PATH '{"sessions": 64}'`: exports a saved model for TF Serving."""

import json
import sys

import keras

from keras_fam.export import export_serving


def main(arguments):
    if len(arguments) not in (2, 3):
        raise SystemExit(__doc__)
    saved, path, *settings = arguments
    model = keras.saving.load_model(saved, compile=False)
    print(export_serving(model, path, **json.loads(settings[0] if settings else "{}")))


if __name__ == "__main__":
    main(sys.argv[1:])
