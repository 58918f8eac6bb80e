"""Data that ships with the kit: public measurements, calibration, prices."""
