"""Exports a saved model for TF Serving from the command line:

    KERAS_BACKEND=tensorflow python -m keras_fam.export MODEL.keras PATH '{"sessions": 64}'

The settings are keyword arguments of `keras_fam.export_serving` as JSON; `-` reads them from standard input, where
other users of the machine cannot see a secret.
"""

import json
import sys

import keras

from keras_fam.export import export_serving


def main(arguments):
    if len(arguments) not in (2, 3):
        raise SystemExit(__doc__)
    saved, path, *settings = arguments
    text = settings[0] if settings else "{}"
    settings = json.loads(sys.stdin.read() if text == "-" else text)
    model = keras.saving.load_model(saved, compile=False)
    print(export_serving(model, path, **settings))


if __name__ == "__main__":
    main(sys.argv[1:])
