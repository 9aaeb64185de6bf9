import keras


def pytest_report_header():
    return f"backend: {keras.backend.backend()}, keras {keras.__version__}"
